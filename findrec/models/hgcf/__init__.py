"""Hyperbolic graph convolution for collaborative filtering."""
