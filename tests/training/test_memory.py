"""The memory that is logged is that of the worker that holds most."""

import json

import pytest
from forked import forked
from memory_on_workers import work


def test_all_workers_log_what_the_largest_holds(tmp_path):
    with forked(work, 3, str(tmp_path / "meeting"), str(tmp_path / "logged"), 300):
        pass
    result = [json.loads((tmp_path / f"logged.{rank}").read_text()) for rank in range(3)]
    logged, own = zip(*result, strict=True)
    assert logged[0] == logged[1] == logged[2] == pytest.approx(own[2], rel=0.02)
    assert own[2] > own[1] + 0.25 > own[0] + 0.5
