"""All forms agree if the history fits the window, and every form gets a row."""

from __future__ import annotations

import pytest
import torch
from bench import repeat_bonus as bench
from bench.repeat_bonus import IMPLS, bench_repeat_bonus, make_run


def test_a_history_within_the_window_gives_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    actual = []

    def keep(output: torch.Tensor, *arguments: torch.Tensor) -> None:
        actual.append(output.detach())

    monkeypatch.setattr(torch.autograd, "grad", keep)
    for window in (20, 9):
        monkeypatch.setattr(bench, "REPEAT_WINDOW", window)
        for impl in IMPLS:
            make_run(impl, (2, 20))()
    whole, *same, again, windowed, fused = actual
    for other in (*same, again):
        torch.testing.assert_close(other, whole)
    torch.testing.assert_close(windowed, fused)
    assert windowed.count_nonzero() < whole.count_nonzero()


@pytest.mark.slow
def test_rows_for_baseline_and_ours() -> None:
    rows = bench_repeat_bonus([(2, 9)], runs=1)
    assert tuple(row.impl for row in rows) == IMPLS
    assert rows[0].ratio == 1.0
    assert {(row.baseline, row.shape) for row in rows} == {(IMPLS[0], "B2 L9")}
    assert min(x for row in rows for x in (row.median_s, row.p10_s, row.ratio)) > 0
