"""Warnings about collapsed latents and collapsed expert routing."""

from __future__ import annotations

from collections.abc import Mapping

from findrec.models.parts.spread import collapse

MIN_LATENT_STD = 0.02  # prior and reference have standard deviation 1
MAX_EXPERT_LOAD = 0.95


def collapse_warnings(values: Mapping[str, float]) -> list[tuple[str, str]]:
    """`(key, message)` for each diagnostic in the logged `values` of a step that is out of bounds."""
    warnings = []
    for key, value in values.items():
        name = key.removeprefix("diagnostics/")
        if (problem := collapse(name, value, MIN_LATENT_STD)) is not None:
            warnings.append((key, f"{problem}; lower model.align.weight or kl_weight"))
        elif name == "expert_load_max" and value > MAX_EXPERT_LOAD:
            warnings.append((key, f"one expert takes {value:.0%}: raise model.routing.balance_weight"))
    return warnings
