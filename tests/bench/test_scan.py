"""The baseline computes the same as the op it is compared with, and a row comes out for each."""

from __future__ import annotations

import pytest
import torch
from torch.nn import functional as F

from findrec.bench.scan import BASELINE, bench_scan, unbind_loop
from findrec.ops.selective_scan import selective_scan


def test_baseline_agrees_with_the_reference() -> None:
    torch.manual_seed(0)
    u, z = torch.randn(2, 9, 6, dtype=torch.float64), torch.randn(2, 9, 6, dtype=torch.float64)
    delta = F.softplus(torch.randn_like(u))
    a, d = -torch.rand(6, 4, dtype=torch.float64), torch.randn(6, dtype=torch.float64)
    b, c = torch.randn(2, 9, 4, dtype=torch.float64), torch.randn(2, 9, 4, dtype=torch.float64)
    expected = selective_scan(u, delta, a, b, c, d, z, impl="reference")
    torch.testing.assert_close(unbind_loop(u, delta, a, b, c, d, z), expected)


@pytest.mark.slow
def test_rows_for_baseline_and_ours() -> None:
    baseline, ours = bench_scan([(1, 8, 4, 4)], runs=1)
    assert baseline.impl == BASELINE
    assert baseline.ratio == 1.0
    assert ours.impl != BASELINE
    assert ours.shape == baseline.shape == "B1 L8 D4 N4"
    assert min(baseline.median_s, ours.median_s, ours.ratio) > 0
