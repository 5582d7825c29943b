"""The FindRec model."""
