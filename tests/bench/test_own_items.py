"""The baseline computes what the windowed forms do where a history fits the window; a row comes for each."""

from __future__ import annotations

import pytest
import torch

from findrec.bench import own_items as bench
from findrec.bench.own_items import IMPLS, bench_own_items, make_run


def test_a_history_within_the_window_gives_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    found = []

    def keep(output: torch.Tensor, *arguments: torch.Tensor) -> None:
        found.append(output.detach())

    monkeypatch.setattr(torch.autograd, "grad", keep)
    for window in (20, 9):
        monkeypatch.setattr(bench, "OWN_WINDOW", window)
        for impl in IMPLS:
            make_run(impl, (2, 20))()
    whole, *same, again, windowed, fused = found
    for other in (*same, again):
        torch.testing.assert_close(other, whole)
    torch.testing.assert_close(windowed, fused)
    assert windowed.count_nonzero() < whole.count_nonzero()


@pytest.mark.slow
def test_rows_for_baseline_and_ours() -> None:
    rows = bench_own_items([(2, 9)], runs=1)
    assert tuple(row.impl for row in rows) == IMPLS
    assert rows[0].ratio == 1.0
    assert {(row.baseline, row.shape) for row in rows} == {(IMPLS[0], "B2 L9")}
    assert min(x for row in rows for x in (row.median_s, row.p10_s, row.ratio)) > 0
