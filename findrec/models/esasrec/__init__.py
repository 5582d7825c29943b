"""The eSASRec model."""
