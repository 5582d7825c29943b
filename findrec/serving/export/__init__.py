"""Exports of trained runs."""
