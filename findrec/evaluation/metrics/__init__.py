"""Metrics and their significance."""
