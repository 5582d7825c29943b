"""Compute kernels, each with a reference implementation."""
