"""Epoch plans, examples and batches."""
