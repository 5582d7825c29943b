"""How spread out a cloud of vectors is, and warnings about collapsed ones.

Shape letters: n vectors, d width.
"""

from __future__ import annotations

import torch
from torch import Tensor

MIN_RANK = 1.5


def spread(centred_nd: Tensor) -> tuple[Tensor, Tensor]:
    """The mean standard deviation over dimensions, and the effective rank, of vectors with mean 0.

    The effective rank is exp of the entropy of the covariance's spectrum (Roy & Vetterli 2007), from 1 to d.
    """
    spectrum = torch.linalg.svdvals(centred_nd).square()
    share = (spectrum / spectrum.sum().clamp(min=1e-12)).clamp(min=1e-12)
    return centred_nd.square().mean(0).sqrt().mean(), torch.exp(-(share * share.log()).sum())


def collapse(name: str, value: float, min_std: float) -> str | None:
    """The problem that a logged `latent_std_<modality>` or `latent_rank_<modality>` shows, if any."""
    if name.startswith("latent_std_") and value < min_std:
        modality = name.removeprefix("latent_std_")
        return f"latents of {modality!r} have collapsed to a point (std {value:.2g})"
    if name.startswith("latent_rank_") and value < MIN_RANK:
        modality = name.removeprefix("latent_rank_")
        return f"latents of {modality!r} have collapsed to a line (rank {value:.2f})"
    return None
