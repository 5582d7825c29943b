"""Exact full-catalogue evaluation of models and baselines."""
