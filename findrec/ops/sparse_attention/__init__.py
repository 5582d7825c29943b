"""Windowed, block and selective attention over long sequences."""
