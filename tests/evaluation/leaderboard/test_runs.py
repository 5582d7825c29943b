"""Which runs of a leaderboard are trained, and what a failure leaves."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import yaml
from saved_run import save_run

from findrec.config import RunConfig
from findrec.datasets.folder.data_folder import DataFolder
from findrec.errors import FindRecError
from findrec.evaluation.leaderboard import runs as runs_module
from findrec.evaluation.leaderboard.config import load_leaderboard
from findrec.evaluation.leaderboard.runs import LOG, is_finished, train_runs
from findrec.evaluation.run import evaluate_run
from findrec.models.config import SequenceConfig
from findrec.training.checkpoints.checkpoint import checkpoint_folder, list_checkpoints
from findrec.training.checkpoints.manifest import MANIFEST
from findrec.training.runs import run_folder

Write = Callable[..., Path]


def test_a_run_is_finished_once_it_is_trained_and_evaluated(
    write: Write, folder: DataFolder, capsys: pytest.CaptureFixture[str]
) -> None:
    path = write(rows={"narrow": {}}, seeds=[0])
    (run,) = load_leaderboard(path).runs
    assert not is_finished(run.config, folder)
    saved = save_run(run_folder(run.config), folder, **run.tree)
    assert not is_finished(run.config, folder)
    evaluate_run(saved, show=False)
    assert is_finished(run.config, folder)
    train_runs([run], {"films": folder})  # which has nothing to do
    assert "1 of 1 runs are finished, 0 are to be trained" in capsys.readouterr().out
    (longer,) = load_leaderboard(path, ["training.epochs=2"]).runs
    assert not is_finished(longer.config, folder)
    with pytest.raises(FindRecError, match=r"another configuration .training.epochs: 1 before, 2 now"):
        train_runs([longer], {"films": folder})
    (masked,) = load_leaderboard(path, ["evaluation.mask_seen=true"]).runs
    assert not is_finished(masked.config, folder)  # it is evaluated again, not trained
    (checkpoint,) = list_checkpoints(checkpoint_folder(saved))
    later = (saved / "metrics.json").stat().st_mtime_ns + 1
    os.utime(checkpoint / MANIFEST, ns=(later, later))
    assert not is_finished(run.config, folder)
    os.utime(checkpoint / MANIFEST, ns=(0, 0))
    assert is_finished(run.config, folder)
    (saved / "metrics.json").write_text("{")
    assert not is_finished(run.config, folder)


def test_an_unfinished_training_is_not_finished(write: Write, folder: DataFolder) -> None:
    path = write(rows={"narrow": {}}, seeds=[0])
    (run,) = load_leaderboard(path, ["training.epochs=2"]).runs
    evaluate_run(save_run(run_folder(run.config), folder, **run.tree), show=False)  # of the first epoch
    assert not is_finished(run.config, folder)


@pytest.mark.slow
@pytest.mark.parametrize("jobs", [1, 2])
def test_failed_runs_are_named_after_the_others(
    jobs: int, write: Write, folder: DataFolder, capfd: pytest.CaptureFixture[str]
) -> None:
    dead = {"cluster.address": "127.0.0.1:1"}
    runs = load_leaderboard(write(rows={"narrow": dead}, seeds=[3, 4])).runs
    with pytest.raises(FindRecError, match="2 of 2 runs failed: films, narrow, seed") as caught:
        train_runs(runs, {"films": folder}, jobs)
    output = capfd.readouterr()
    assert output.out.count("FAILED: films, narrow") == 2
    for run in runs:
        assert str(run_folder(run.config)) in str(caught.value)
        log = run_folder(run.config) / LOG
        assert log.is_file() == (jobs > 1)
        text = log.read_text() if jobs > 1 else output.err
        assert "no Ray cluster answers at '127.0.0.1:1'" in text
    assert ("no Ray cluster answers" in str(caught.value)) == (jobs > 1)


class Cores:
    """Room for three cores; a run takes an eighth of its width."""

    def __init__(self) -> None:
        self.taken: dict[str, int] = {}
        self.history: list[int] = []  # cores in use after each start

    def reserve(self, run: str, config: RunConfig) -> bool:
        assert isinstance(config.model, SequenceConfig)
        need = config.model.dim // 8
        if sum(self.taken.values()) + need > 3:
            return False
        self.taken[run] = need
        self.history.append(sum(self.taken.values()))
        return True

    def release(self, run: str) -> None:
        del self.taken[run]


def test_runs_start_in_order_when_there_is_room(
    write: Write, folder: DataFolder, monkeypatch: pytest.MonkeyPatch
) -> None:
    room, started, under_way, most = Cores(), list[str](), set[int](), 0
    shared: list[int] = []

    class Process:
        """Stands for a training: it ends after others had the time to start."""

        def __init__(self, command: list[str], **_: object) -> None:
            nonlocal most
            tree = yaml.safe_load(Path(command[-1]).read_text())
            started.append(f"{tree['name']} at {os.environ['CLUSTER']}")
            under_way.add(id(self))
            most = max(most, len(under_way))

        def wait(self) -> int:
            time.sleep(0.3)
            under_way.remove(id(self))
            return 1 if len(started) > 4 else 0

    @contextmanager
    def share(configs: Sequence[RunConfig]) -> Iterator[Cores]:
        shared.append(len(configs))
        with pytest.MonkeyPatch.context() as patch:
            patch.setenv("CLUSTER", "here")
            yield room

    monkeypatch.setattr(runs_module.subprocess, "Popen", Process)
    monkeypatch.setattr(runs_module, "_ROOM_S", 0.01)
    rows: dict[str, Any] = {"narrow": {}, "widest": {"model.dim": 24}, "wide": {"model.dim": 16}}
    runs = load_leaderboard(write(rows=rows)).runs
    with pytest.raises(FindRecError, match=r"films, wide, seed 1.*exit code 1"):
        train_runs(runs, {"films": folder}, 0, share)
    names = ("narrow-s0", "narrow-s1", "widest-s0", "widest-s1", "wide-s0", "wide-s1")
    # Two that start at once may do so in any order.
    assert [*sorted(started[:2]), *started[2:]] == [f"{name} at here" for name in names]
    assert shared == [6]
    assert room.history == [1, 2, 3, 3, 2, 2]
    assert room.taken == {}
    assert most == 2


def test_the_runs_that_three_failures_prevent_are_counted(
    write: Write, folder: DataFolder, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Process:
        """Stands for a training that fails at once."""

        def __init__(self, command: list[str], **_: object) -> None:
            pass

        def wait(self) -> int:
            return 2

    monkeypatch.setattr(runs_module.subprocess, "Popen", Process)
    runs = load_leaderboard(write(seeds=[0, 1, 2])).runs
    with pytest.raises(FindRecError, match="3 of 6 runs failed, and then 3 were not started: films, narrow"):
        train_runs(runs, {"films": folder})
