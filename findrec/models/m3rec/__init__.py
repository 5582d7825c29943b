"""The M3Rec model."""
