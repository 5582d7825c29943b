"""Hyperbolic diffusion on user-item pairs."""
