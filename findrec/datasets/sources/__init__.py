"""Recipes and the raw files that they describe."""
