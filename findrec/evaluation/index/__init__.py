"""FAISS indexes of item vectors."""
