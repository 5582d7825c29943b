"""Exact and FAISS search of item vectors."""
