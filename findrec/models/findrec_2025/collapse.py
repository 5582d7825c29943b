"""Warnings about collapsed latents and collapsed expert routing."""

from __future__ import annotations

from collections.abc import Mapping

MIN_LATENT_STD = 0.02  # prior and reference have standard deviation 1
MIN_LATENT_RANK = 1.5
MAX_EXPERT_LOAD = 0.95
_FIX_LATENTS = "; lower model.align.weight or kl_weight"


def collapse_warnings(values: Mapping[str, float]) -> list[tuple[str, str]]:
    """`(key, message)` for each diagnostic in the logged `values` of a step that is out of bounds."""
    warnings = []
    for key, value in values.items():
        name = key.removeprefix("diagnostics/")
        problem = None
        if name.startswith("latent_std_") and value < MIN_LATENT_STD:
            modality = name.removeprefix("latent_std_")
            problem = f"latents of {modality!r} have collapsed to a point (std {value:.2g}){_FIX_LATENTS}"
        elif name.startswith("latent_rank_") and value < MIN_LATENT_RANK:
            modality = name.removeprefix("latent_rank_")
            problem = f"latents of {modality!r} have collapsed to a line (rank {value:.2f}){_FIX_LATENTS}"
        elif name == "expert_load_max" and value > MAX_EXPERT_LOAD:
            problem = f"one expert takes {value:.0%}: raise model.routing.balance_weight"
        if problem is not None:
            warnings.append((key, problem))
    return warnings
