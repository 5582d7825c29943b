"""Saving, selecting, loading and uploading checkpoints."""
