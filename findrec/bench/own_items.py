"""The bonus of own items, from a batch to the gradient of its weights: the fused walk against torch.

| implementation         | what                                                                        |
|------------------------|-----------------------------------------------------------------------------|
| `whole history, torch` | every item of the history is an own item, all features are formed: baseline |
| `window, torch`        | the same for the items of the last 1,024 events                             |
| `window`               | what `auto` picks here: on the CPU the fused walk                           |

Items are drawn from a Zipf law over 20,000, and every position asks.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch

from findrec.bench.compare import Case, compare
from findrec.bench.model import draw_items, shown_batch
from findrec.bench.rows import Row
from findrec.models.repeat import OWN_WINDOW, own_items
from findrec.ops.own_bonus import NUM_REPEAT_FEATURES

Shape = tuple[int, int]  # B, L
SHAPES: tuple[Shape, ...] = ((16, 200), (4, 1024), (1, 16_384))
IMPLS = ("whole history, torch", "window, torch", "window")
ITEMS = 20_000
LONG = 16_384  # steps from which three runs must do: the baseline takes seconds for one


def make_run(impl: str, shape: Shape, device: str = "cpu") -> Callable[[], None]:
    """A function that finds the own items of a batch, and their bonuses forward and backward."""
    rows, length = shape
    generator = torch.Generator().manual_seed(0)
    item_BX = draw_items(rows * (length + 1), ITEMS, generator).view(rows, -1)
    batch = shown_batch(item_BX).to(device)
    weights = torch.randn(rows * length, NUM_REPEAT_FEATURES, generator=generator).to(device).requires_grad_()
    window = max(length, OWN_WINDOW) if impl.startswith("whole") else OWN_WINDOW

    def run() -> None:
        own = own_items(batch, window).bonus(weights, "auto" if impl == "window" else "reference")
        torch.autograd.grad(own.bonus_TN, weights, torch.ones_like(own.bonus_TN))

    return run


def bench_own_items(shapes: Sequence[Shape] = SHAPES, runs: int = 11) -> list[Row]:
    """Rows of the three implementations at each `(B, L)`."""
    cases = [
        Case(
            shape, "B{} L{}".format(*shape), IMPLS[:1], IMPLS[1:], min(runs, 3) if shape[1] >= LONG else runs
        )
        for shape in shapes
    ]
    return compare("own_bonus", cases, make_run)
