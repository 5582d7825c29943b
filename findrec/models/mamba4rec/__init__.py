"""The Mamba4Rec model."""
