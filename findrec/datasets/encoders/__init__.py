"""Item features from texts, images and precomputed vectors."""
