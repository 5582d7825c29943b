"""The learning rate of each step: linear warm-up, then cosine decay to a floor, or constant."""

from __future__ import annotations

import math

from findrec.config import OptimConfig


def learning_rate(step: int, num_steps: int, optim: OptimConfig) -> float:
    """The learning rate of step `step` (from 0) of `num_steps`."""
    warmup = max(1, round(optim.warmup * num_steps))
    if step < warmup:
        return optim.lr * (step + 1) / warmup
    if optim.schedule == "constant":
        return optim.lr
    done = (step - warmup) / max(1, num_steps - warmup)
    return optim.lr * (optim.floor + (1 - optim.floor) * 0.5 * (1 + math.cos(math.pi * done)))
