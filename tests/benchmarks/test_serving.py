"""The benchmark of the service measures answers of a real process."""

from pathlib import Path

import pytest
from bench.serving import bench_serving, make_run

from findrec.errors import FindRecError
from findrec.serving.export.export import export_run
from findrec.serving.recommender import Recommender


def test_rows_of_a_small_run(tmp_path: Path) -> None:
    run = make_run(tmp_path, num_items=300, dim=8, num_users=20)
    assert len(Recommender.load(run).recommend(["3"])[0].items) == 10
    rows = bench_serving(run, tmp_path, [2], 0.5)
    assert [row["request"] for row in rows] == ["user", "visitor", "append"]
    for row in rows:
        assert (row["items"], row["clients"], row["refused"]) == (300, 2, 0)
        assert 0 < row["p50_ms"] <= row["p99_ms"]
        # In a closed loop, the mean latency times the throughput is the number of clients.
        assert row["requests_per_s"] > 1
    with pytest.raises(FindRecError, match="has no users"):
        bench_serving(export_run(run, tmp_path / "export"), tmp_path, [1], 0.1)
