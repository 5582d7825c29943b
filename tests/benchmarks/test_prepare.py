"""Rows of preparation with its time and memory; failures are reported."""

from __future__ import annotations

from pathlib import Path

import pytest
from bench.prepare import PrepareBench, bench_plan, bench_prepare

from findrec.datasets.sources.duckdb_engine import Limits
from findrec.errors import FindRecError

LIMITS = Limits(0.5, 1)


def test_synthetic_events_are_prepared_and_measured(tmp_path: Path) -> None:
    row = bench_prepare(PrepareBench(5000, "ml-latest-small", 300, None, {}, tmp_path, LIMITS))
    assert 1000 < row["events"] < 20_000
    assert 0 < row["items"] <= 300
    assert {"fetch", "read", "filter", "order", "items", "features", "write"} == set(row["seconds"])
    assert row["events_per_s"] == pytest.approx(row["events"] / sum(row["seconds"].values()), rel=0.5)
    assert 50 << 20 < row["peak_bytes"] < 4 << 30
    assert list(tmp_path.iterdir()) == []


def test_an_existing_log_with_recipe_keys(tmp_path: Path) -> None:
    log = tmp_path / "mine.csv"
    log.write_text("user,item,timestamp\n" + "".join(f"{n % 3},{n % 4},{n}\n" for n in range(24)))
    row = bench_prepare(PrepareBench(0, "", None, log, {"min_events": 8}, tmp_path, LIMITS))
    assert (row["users"], row["items"], row["events"], row["profile"]) == (3, 4, 24, "mine.csv")
    with pytest.raises(FindRecError, match="min_events=9"):
        bench_prepare(PrepareBench(0, "", None, log, {"min_events": 9}, tmp_path, LIMITS))


def test_planning_row() -> None:
    row = bench_plan(2000, mean=5.0, max_length=20, tokens=256, microbatches=4)
    assert row["windows"] >= 1000
    assert row["steps"] > 1
    assert row["plan_s"] > 0
