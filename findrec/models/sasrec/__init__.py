"""The SASRec model."""
