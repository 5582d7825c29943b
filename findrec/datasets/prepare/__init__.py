"""Preparation of data folders from recipes."""
