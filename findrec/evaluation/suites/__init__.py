"""Robustness suites."""
