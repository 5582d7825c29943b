"""Full training steps train, count their targets and give comparable rows."""

from __future__ import annotations

import pickle
from dataclasses import replace

import pytest
import torch
from bench.model import (
    BASELINE,
    OUR_SCAN,
    Shape,
    bench_lengths,
    bench_published,
    draw_items,
    findrec_step,
    next_item_batch,
    per_thousand,
    published_step,
)
from bench.rows import make_rate_table, publish

from findrec.timer import Timing

TINY = Shape(3, 5, 16, 30, (("image", 6), ("text", 4)))


def test_every_event_but_the_first_is_a_target() -> None:
    histories = torch.tensor([[5, 6, 7, 8], [9, 9, 1, 2]])
    batch = next_item_batch(histories)
    assert batch.item.tolist() == [[5, 6, 7], [9, 9, 1]]
    assert batch.target.tolist() == [6, 7, 8, 9, 1, 2]
    assert batch.position.tolist() == list(range(6))
    assert batch.ids.tolist() == [0, 1, 5, 6, 7, 9]


def test_targets_per_step() -> None:
    assert published_step(TINY)() == 3  # one a sample
    assert findrec_step(TINY)() == 15  # every position
    assert findrec_step(TINY, ["training.loss.kind=sampled", "training.loss.negatives=8"])() == 15


def test_overrides_reach_the_model() -> None:
    with pytest.raises(Exception, match=r"routing.heads=3"):
        findrec_step(TINY, ["model.name=findrec-2025", "model.routing.heads=3"])


def test_items_follow_zipfs_law() -> None:
    drawn = draw_items(20_000, 9, torch.Generator().manual_seed(0))
    count = torch.bincount(drawn, minlength=10).float()
    assert count[0] == 0
    torch.testing.assert_close(count[1] / count[4], torch.tensor(4.0), rtol=0.15, atol=0)


def test_times_are_per_thousand_targets() -> None:
    assert per_thousand(Timing((2.0, 4.0)), 500).seconds == (4.0, 8.0)


@pytest.fixture
def quick_peaks(monkeypatch: pytest.MonkeyPatch) -> None:
    """No process for each peak (tests/bench/test_memory.py starts one), but all that one is sent."""
    monkeypatch.setattr("bench.model.peak_bytes", lambda *sent: len(pickle.dumps(sent)))


@pytest.mark.usefixtures("quick_peaks")
def test_rows(capsys: pytest.CaptureFixture[str]) -> None:
    rows = bench_published(runs=1, shapes=[TINY])
    ours = ["findrec-2025 exact", "findrec-2025 sampled 1024"]
    assert [row.impl for row in rows] == [BASELINE, OUR_SCAN, *ours, *ours]
    assert [row.baseline for row in rows] == [BASELINE] * 4 + [OUR_SCAN] * 2
    assert {row.shape for row in rows} == {"B3 L5 d16 V30"}
    assert rows[0].ratio == 1.0
    for row in rows:
        baseline = rows[0] if row.baseline == BASELINE else rows[1]
        assert row.ratio == pytest.approx(baseline.median_s / row.median_s)
        assert row.peak_bytes > 0
    publish([rows[0], replace(rows[1], op="training to a level", median_s=12.0)], None, make_rate_table)
    shown = capsys.readouterr().out
    assert f"{1000 / rows[0].median_s:,.0f} targets/s" in shown
    assert "12.0 s" in shown


@pytest.mark.usefixtures("quick_peaks")
def test_lengths_have_equal_numbers_of_tokens() -> None:
    rows = bench_lengths(runs=1, lengths=(4, 200), tokens=400, items=30, features=(("text", 4),))
    assert [row.shape.split(" d")[0] for row in rows] == ["B100 L4", "B2 L200"] * 3
    assert [row.impl for row in rows[:2]] == ["id stream L4", "id stream L200"]
    assert all(row.baseline == rows[n // 2 * 2 + 1].impl for n, row in enumerate(rows))
    assert [row.ratio for row in rows[1::2]] == [1.0] * 3
