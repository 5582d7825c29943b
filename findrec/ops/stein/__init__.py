"""Stein discrepancies."""
