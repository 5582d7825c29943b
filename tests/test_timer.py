"""Runs alternate, warm-up does not count, and the quantiles are those of the runs."""

from __future__ import annotations

import pytest

from findrec.timer import Timing, time_alternating


def test_runs_alternate_and_warmup_does_not_count() -> None:
    now = 0.0
    order: list[str] = []
    waits = 0

    def spend(name: str, seconds: float) -> None:
        nonlocal now
        order.append(name)
        now += seconds

    def wait() -> None:
        nonlocal waits
        waits += 1

    timings = time_alternating(
        {"a": lambda: spend("a", 1.0), "b": lambda: spend("b", 4.0)},
        runs=3,
        warmup=1,
        wait=wait,
        clock=lambda: now,
    )
    assert order == ["a", "b", "a", "b", "b", "a", "a", "b"]
    assert timings == {"a": Timing((1.0,) * 3), "b": Timing((4.0,) * 3)}
    assert waits == 12


def test_quantiles() -> None:
    timing = Timing(tuple(float(s) for s in range(21, 0, -1)))
    assert timing.median_s == 11
    assert timing.p10_s == 3
    assert Timing((2.0,)).p10_s == 2


def test_no_runs_are_refused() -> None:
    with pytest.raises(ValueError, match="runs=0"):
        time_alternating({"a": lambda: None}, runs=0)
