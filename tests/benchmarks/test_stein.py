"""Every implementation gets a row."""

from __future__ import annotations

import pytest
from bench.stein import bench_stein


@pytest.mark.slow
def test_rows_for_baseline_and_ours() -> None:
    rows = bench_stein([(8, 3)], runs=1)
    assert [row.impl for row in rows] == ["reference", "tiled"]
    assert rows[0].ratio == 1.0
    assert {(row.baseline, row.shape) for row in rows} == {(rows[0].impl, "n8 D3")}
    assert min(x for row in rows for x in (row.median_s, row.p10_s, row.ratio)) > 0
