"""Benchmark of the repeat-consumption bonus, forward and backward: the fused kernel against torch.

| implementation         | description                                                             |
|------------------------|-------------------------------------------------------------------------|
| `whole history, torch` | every item of the history is a repeat candidate, in torch: the baseline |
| `window, torch`        | the same for the items of the last 1,024 events                         |
| `window`               | the `auto` implementation: on the CPU the fused kernel                  |

Items are drawn from a Zipf law over 20,000, and every position is a target.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from bench.compare import Case, compare
from bench.model import draw_items, next_item_batch
from bench.rows import Row

from findrec.models.parts.repeat import REPEAT_WINDOW, repeat_candidates
from findrec.ops.repeat_bonus import NUM_REPEAT_FEATURES

Shape = tuple[int, int]  # B, L
SHAPES: tuple[Shape, ...] = ((16, 200), (4, 1024), (1, 16_384))
IMPLS = ("whole history, torch", "window, torch", "window")
ITEMS = 20_000
LONG = 16_384  # length from which only three runs are made: the baseline takes seconds


def make_run(impl: str, shape: Shape, device: str = "cpu") -> Callable[[], None]:
    """Return a function that computes the repeat candidates of a batch and their bonuses and gradients."""
    rows, length = shape
    generator = torch.Generator().manual_seed(0)
    item_BX = draw_items(rows * (length + 1), ITEMS, generator).view(rows, -1)
    batch = next_item_batch(item_BX).to(device)
    weights = torch.randn(rows * length, NUM_REPEAT_FEATURES, generator=generator).to(device).requires_grad_()
    window = max(length, REPEAT_WINDOW) if impl.startswith("whole") else REPEAT_WINDOW

    def run() -> None:
        own = repeat_candidates(batch, window).bonus(weights, "auto" if impl == "window" else "reference")
        torch.autograd.grad(own.bonus_TN, weights, torch.ones_like(own.bonus_TN))

    return run


def bench_repeat_bonus(shapes: Sequence[Shape] = SHAPES, runs: int = 11) -> list[Row]:
    """Measure the three implementations at each `(B, L)`."""
    cases = [
        Case(
            shape, "B{} L{}".format(*shape), IMPLS[:1], IMPLS[1:], min(runs, 3) if shape[1] >= LONG else runs
        )
        for shape in shapes
    ]
    return compare("own_bonus", cases, make_run)
