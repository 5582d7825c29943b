"""Exact ranks of targets in the catalogue."""
