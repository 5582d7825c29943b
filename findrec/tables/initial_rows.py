"""Draws the initial rows of a table, independent of how they are distributed over workers."""

from __future__ import annotations

import torch
from torch import Tensor

TABLE_STD = 0.2  # times width^-0.5: initial standard deviation of rows, and of content added to them
_BLOCK_ROWS = 4096
_MIN_DRAWN = 16  # torch draws fewer normal numbers by another formula


def initial_rows(num_rows: int, dim: int, *, seed: int, part: range | None = None) -> Tensor:
    """Rows `[n, dim]` from `N(0, 0.04 / dim)`: all, or a range (`part`); row 0, the padding, is zero.

    The numbers are those of one `torch.randn(num_rows, dim)`, drawn in blocks: blocks before the range are
    dropped (about 10 ns per number), those after it are not drawn.
    """
    part = range(num_rows) if part is None else part
    rows = torch.empty(len(part), dim)
    generator = torch.Generator().manual_seed(seed)
    start = 0
    while start < part.stop:
        stop = start + _BLOCK_ROWS
        if (num_rows - stop) * dim < _MIN_DRAWN:
            stop = num_rows
        block = torch.randn(stop - start, dim, generator=generator)
        low, high = max(part.start, start), min(part.stop, stop)
        if low < high:
            rows[low - part.start : high - part.start] = block[low - start : high - start]
        start = stop
    rows *= dim**-0.5
    rows *= TABLE_STD
    if part.start == 0:
        rows[:1] = 0.0
    return rows
