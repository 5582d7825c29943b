"""Every implementation gets a row."""

from __future__ import annotations

import pytest
from bench.sparse_attention import bench_sparse_attention


@pytest.mark.slow
def test_rows_for_baseline_and_ours() -> None:
    rows = bench_sparse_attention([(1, 300, 2, 1, 4)], runs=1)
    assert [row.impl for row in rows] == ["dense", "sparse"]
    assert rows[0].ratio == 1.0
    assert min(x for row in rows for x in (row.median_s, row.p10_s, row.ratio)) > 0
