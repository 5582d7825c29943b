"""The BiVRec model."""
