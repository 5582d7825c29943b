"""The MUFASA model."""
