"""Logs, traces and the MLflow mirror of a training."""
