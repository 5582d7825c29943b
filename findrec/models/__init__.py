"""Models: their interface, and one folder per model."""
