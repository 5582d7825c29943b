"""Warnings about a training that runs but goes wrong; each is given once."""

from __future__ import annotations

from collections.abc import Mapping

from findrec.progress import say

LEAST_STD = 0.02  # of latents whose prior and reference have standard deviation 1
LEAST_RANK = 1.5
LARGEST_LOAD = 0.95


class Alarms:
    """Looks at the values of each step (those of a step that measures nothing are just fewer)."""

    def __init__(self) -> None:
        self._given: set[str] = set()

    def check(self, step: int, values: Mapping[str, float]) -> None:
        """Say what is wrong with the diagnostics among `values`, if anything is."""
        for key, value in values.items():
            name = key.removeprefix("diagnostics/")
            if name.startswith("latent_std_") and value < LEAST_STD:
                modality = name.removeprefix("latent_std_")
                self._warn(key, step, f"latents of {modality!r} have collapsed to a point (std {value:.2g})")
            elif name.startswith("latent_rank_") and value < LEAST_RANK:
                modality = name.removeprefix("latent_rank_")
                self._warn(key, step, f"latents of {modality!r} have collapsed to a line (rank {value:.2f})")
            elif name == "expert_load_max" and value > LARGEST_LOAD:
                self._warn(key, step, f"one expert takes {value:.0%}: raise model.routing.balance_weight")

    def _warn(self, key: str, step: int, what: str) -> None:
        if key not in self._given:
            self._given.add(key)
            advice = "; lower model.align.weight or kl_weight" if "latents" in what else ""
            say(f"WARNING step {step}: {what}{advice}")
