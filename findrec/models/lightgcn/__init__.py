"""The LightGCN model."""
