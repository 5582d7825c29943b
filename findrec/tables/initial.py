"""The rows a table starts with: a function of the seed alone, whoever holds which of them."""

from __future__ import annotations

import torch
from torch import Tensor

_BLOCK_ROWS = 4096
_LEAST_DRAWN = 16  # torch draws fewer normal numbers than this by another formula


def initial_rows(num_rows: int, dim: int, *, seed: int, part: range | None = None) -> Tensor:
    """Rows of `N(0, 0.04 / dim)`, all or a `part` of them, `[n, dim]`; row 0, the padding, is zero.

    The same numbers as one `torch.randn(num_rows, dim)`, without holding it: blocks before the part are
    drawn and dropped (about 10 ns a number), those after it are not drawn.
    """
    part = range(num_rows) if part is None else part
    rows = torch.empty(len(part), dim)
    generator = torch.Generator().manual_seed(seed)
    start = 0
    while start < part.stop:
        stop = start + _BLOCK_ROWS
        if (num_rows - stop) * dim < _LEAST_DRAWN:
            stop = num_rows
        block = torch.randn(stop - start, dim, generator=generator)
        low, high = max(part.start, start), min(part.stop, stop)
        if low < high:
            rows[low - part.start : high - part.start] = block[low - start : high - start]
        start = stop
    rows *= dim**-0.5
    rows *= 0.2
    if part.start == 0:
        rows[:1] = 0.0
    return rows
