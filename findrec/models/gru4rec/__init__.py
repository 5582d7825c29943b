"""The GRU4Rec model."""
