"""Losses over the catalogue and between latents."""
