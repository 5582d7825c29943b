"""The rows a table starts with: a function of the seed alone, whoever holds which of them."""

from __future__ import annotations

import torch
from torch import Tensor

_BLOCK_ROWS = 4096
_LEAST_DRAWN = 16  # torch draws fewer normal numbers than this by another formula


def initial_rows(num_rows: int, dim: int, *, seed: int, first: int = 0, end: int | None = None) -> Tensor:
    """Rows `first` to `end - 1` of `N(0, 0.04 / dim)`; row 0, the padding, is zero.

    The same numbers as one `torch.randn(num_rows, dim)`, without holding it: blocks before the range are
    drawn and dropped (about 10 ns a number), those after it are not drawn.
    """
    end = num_rows if end is None else end
    rows = torch.empty(max(0, end - first), dim)
    generator = torch.Generator().manual_seed(seed)
    start = 0
    while start < min(end, num_rows):
        stop = start + _BLOCK_ROWS
        if (num_rows - stop) * dim < _LEAST_DRAWN:
            stop = num_rows
        block = torch.randn(stop - start, dim, generator=generator)
        low, high = max(first, start), min(end, stop)
        if low < high:
            rows[low - first : high - first] = block[low - start : high - start]
        start = stop
    rows *= dim**-0.5
    rows *= 0.2
    if first == 0:
        rows[:1] = 0.0
    return rows
