"""The memory that is logged is that of the worker that holds most, now and at its peak."""

import json

import pytest
from forked import forked
from memory_on_workers import work


def test_all_workers_log_what_the_largest_holds_and_has_held(tmp_path):
    with forked(work, 3, str(tmp_path / "meeting"), str(tmp_path / "logged"), 300):
        pass
    result = [json.loads((tmp_path / f"logged.{rank}").read_text()) for rank in range(3)]
    logged, own, after = zip(*result, strict=True)
    assert logged[0] == logged[1] == logged[2]
    assert logged[0]["memory/worker_gib"] == pytest.approx(own[2], rel=0.02)
    assert own[2] > own[1] + 0.25 > own[0] + 0.5
    assert after[0] == after[1] == after[2]
    assert after[0]["memory/worker_gib"] < own[2] - 0.5  # freed
    assert after[0]["memory/worker_peak_gib"] >= own[2] - 0.01
