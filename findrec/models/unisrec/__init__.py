"""The UniSRec model."""
