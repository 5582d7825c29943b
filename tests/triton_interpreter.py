"""Triton kernels on a machine without a GPU: Triton's interpreter, which `conftest.py` selects there.

The interpreter computes whole tiles with numpy, except for associative scans, which it takes element by
element: thousands of Python calls for a tile. `fast_scans` replaces that by a loop over one axis.
"""

from __future__ import annotations

import importlib.util
import os

import numpy as np
import pytest

INSTALLED = importlib.util.find_spec("triton") is not None
INTERPRETED = INSTALLED and os.environ.get("TRITON_INTERPRET") == "1"

needs_interpreter = pytest.mark.skipif(
    not INTERPRETED, reason="needs the package triton, and no GPU (TRITON_INTERPRET=1)"
)


def scan_by_slices(self, tensors):
    """What `ScanOps.generic_scan` computes, in as many steps as the axis is long."""
    running, columns = None, []
    for i in range(tensors[0].handle.data.shape[self.axis]):
        now = tuple(self.to_tensor(x.handle.data.take(i, self.axis), x.dtype) for x in tensors)
        running = now if running is None else self.combine_fn.fn(*running, *now)
        columns.append([x.handle.data for x in running])
    stacked = (np.stack(parts, self.axis) for parts in zip(*columns, strict=True))
    return [self.to_tensor(data, x.dtype) for data, x in zip(stacked, tensors, strict=True)]


@pytest.fixture
def fast_scans(monkeypatch):
    if INTERPRETED:
        from triton.runtime.interpreter import ScanOps

        monkeypatch.setattr(ScanOps, "generic_scan", scan_by_slices)
