"""Warnings about collapsed latents and about gates that close to true content."""

from __future__ import annotations

from collections.abc import Mapping

from findrec.models.parts.spread import collapse

MIN_LATENT_STD = 0.002  # item vectors start at 0.2 / sqrt(d), 0.025 at width 64
MIN_TRUE_GATE = 0.05


def collapse_warnings(values: Mapping[str, float]) -> list[tuple[str, str]]:
    """`(key, message)` for each diagnostic in the logged `values` of a step that is out of bounds."""
    warnings = []
    for key, value in values.items():
        name = key.removeprefix("diagnostics/")
        problem = collapse(name, value, MIN_LATENT_STD)
        if name.startswith("gate_true_") and value < MIN_TRUE_GATE:
            modality = name.removeprefix("gate_true_")
            problem = f"true content of {modality!r} is hardly used (mean gate {value:.2f})"
        if problem is not None:
            warnings.append((key, f"{problem}; check the features, or lower training.optim.lr"))
    return warnings
