"""Every implementation gets a row."""

from __future__ import annotations

import pytest
from bench.attention import bench_attention


@pytest.mark.slow
def test_rows_for_baseline_and_ours() -> None:
    rows = bench_attention([(1, 1, 300, 2, 4)], runs=1)
    assert [row.impl for row in rows] == ["full", "window 256"]
    assert rows[0].ratio == 1.0
    assert {(row.baseline, row.shape) for row in rows} == {(rows[0].impl, "M1 B1 L300 H2 h4")}
    assert min(x for row in rows for x in (row.median_s, row.p10_s, row.ratio)) > 0
