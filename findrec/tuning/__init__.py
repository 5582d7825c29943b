"""Tuning: trials of a configuration with other values of some keys, and a report of which keys mattered."""
