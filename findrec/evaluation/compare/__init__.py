"""Significance tests between models."""
