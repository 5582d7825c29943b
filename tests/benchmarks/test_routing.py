"""The baseline agrees with the op, and every implementation gets a row."""

from __future__ import annotations

import pytest
import torch
from bench.routing import bench_routing, loops

from findrec.ops.expert_routing import expert_routing


@pytest.mark.parametrize("top_k", [None, 2])
def test_baseline_agrees_with_the_reference(top_k: int | None) -> None:
    torch.manual_seed(0)
    x, logits, weight, bias = (
        torch.randn(*size).double() for size in ((9, 2, 3), (9, 2, 4), (2, 4, 3, 5), (2, 4, 5))
    )
    expected = expert_routing(x, logits, weight, bias, top_k=top_k, impl="reference").out_THo
    torch.testing.assert_close(loops(x, logits, weight, bias, top_k), expected)


@pytest.mark.slow
def test_rows_for_baseline_and_ours() -> None:
    rows = bench_routing([(5, 2, 4, 3, 6, 2)], runs=1)
    assert [row.impl for row in rows] == ["loops", "dense", "sparse"]
    assert rows[0].ratio == 1.0
    assert {(row.baseline, row.shape) for row in rows} == {(rows[0].impl, "T5 H2 E4 i3 o6 k2")}
    assert min(x for row in rows for x in (row.median_s, row.p10_s, row.ratio)) > 0
