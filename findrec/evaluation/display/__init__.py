"""Shared parts of tables, plots and HTML pages."""
