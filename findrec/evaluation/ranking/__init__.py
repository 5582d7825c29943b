"""Exact ranks of splits."""
