"""Embedding tables, replicated or sharded by rows."""
