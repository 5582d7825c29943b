"""Data folders: format, writing, reading and verification."""
