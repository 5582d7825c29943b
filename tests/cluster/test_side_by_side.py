"""Room for runs side by side, on a real cluster of this machine."""

from __future__ import annotations

import os

import pytest

from findrec.cluster.side_by_side import shared_cluster
from findrec.config import RunConfig, parse_config
from findrec.ray_session import usable_cpus


def run(threads: int, **cluster: object) -> RunConfig:
    """A run of one worker."""
    return parse_config({"cluster": {"workers": 1, "threads": threads, "gpu": False, **cluster}})


@pytest.mark.ray
@pytest.mark.slow
def test_runs_get_room_until_the_cores_are_taken(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    cores = usable_cpus()
    small, whole = run(1), run(cores)
    with shared_cluster([small, whole]) as room:
        assert room is not None
        assert os.environ["RAY_ADDRESS"].startswith("127.0.0.1:")
        assert room.reserve("whole", whole)
        assert not room.reserve("small", small)
        room.release("whole")
        assert [room.reserve(f"small {n}", small) for n in range(cores + 1)] == [True] * cores + [False]
        assert not room.reserve("whole", whole)
        for n in range(cores):
            room.release(f"small {n}")
        assert room.reserve("too large", run(cores + 1))  # alone: its own error says what is missing
    assert "RAY_ADDRESS" not in os.environ


def test_runs_on_different_clusters_share_nothing() -> None:
    with shared_cluster([run(1, address="127.0.0.1:1"), run(1, address="127.0.0.1:2")]) as room:
        assert room is None
