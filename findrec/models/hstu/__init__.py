"""The HSTU model."""
