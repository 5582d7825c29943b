"""Checkpoints written beside training hold the step they were taken at; a disk that fails stops nothing."""

import threading
from types import SimpleNamespace

import pytest
import torch
from planted import Silent, planted_folder, planted_run

from findrec.errors import FindRecError
from findrec.training.checkpoints import manager, saving
from findrec.training.checkpoints.checkpoint import TrainState, list_checkpoints, read_state
from findrec.training.worker import Worker

TRAINING = {"epochs": 3, "save_steps": 2, "keep": 99}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return planted_folder(tmp_path_factory.mktemp("data"), num_users=60)


@pytest.fixture
def beside(monkeypatch):
    """As on a GPU."""
    monkeypatch.setattr(manager, "saves_in_background", lambda *_: True)


def contents(run):
    return {
        (path.name, file.name): file.read_bytes()
        for path in list_checkpoints(run / "checkpoints")
        for file in path.iterdir()
    }


class Steps(Silent):
    """Knows the last step that was logged."""

    def __init__(self):
        self.last = 0

    def log(self, step, epoch, values):
        self.last = step


def test_training_goes_on_and_the_checkpoint_is_of_its_step(folder, tmp_path, monkeypatch, beside):
    steps, real, seen = Steps(), saving.save_checkpoint, []

    def slow(root, state, **parts):
        if not seen:
            event = threading.Event()
            for _ in range(200):  # two steps later this one is written
                if steps.last >= state.step + 1:
                    break
                event.wait(0.05)
        seen.append(steps.last - state.step)
        return real(root, state, **parts)

    monkeypatch.setattr(saving, "save_checkpoint", slow)
    got = planted_run(tmp_path / "beside", folder, training=TRAINING, log=steps)
    assert seen[0] >= 1
    monkeypatch.undo()
    want = planted_run(tmp_path / "plain", folder, training=TRAINING)
    assert contents(got) == contents(want)


def test_a_failing_disk_gives_warnings_and_an_error_at_the_last_save(
    folder, tmp_path, monkeypatch, capsys, beside
):
    def full(*_, **__):
        raise OSError("No space left on device")

    monkeypatch.setattr(saving, "save_checkpoint", full)
    with pytest.raises(FindRecError, match=r"No space left on device\. Make room there"):
        planted_run(tmp_path / "run", folder, training=TRAINING)
    output = capsys.readouterr().out
    assert output.count("WARNING: the checkpoint of step") >= 2
    assert "Training goes on" in output


def test_older_ones_are_deleted_after_the_newer_is_written(folder, tmp_path, beside):
    run = planted_run(tmp_path / "run", folder, training=TRAINING | {"keep": 1})
    left = list_checkpoints(run / "checkpoints")
    newest = read_state(left[-1])
    assert {path.name for path in left} == {f"step-{step:08d}" for step in (newest.step, newest.best_step)}


@pytest.mark.parametrize("rank", [0, 1])
def test_only_the_worker_that_writes_copies_the_tensors(tmp_path, rank):
    """The others take part in the collective calls of a tower that is sharded."""
    calls = []

    def noted(name):
        def values():
            calls.append(name)
            return {name: torch.ones(2, 2)}

        return values

    tower = SimpleNamespace(weights=noted("weights"), optimizer_state=noted("optimizer_state"))
    table = SimpleNamespace(state=noted("table"))
    state = TrainState(epoch=1, step=5, plan="p", best=0.5, best_step=5, stale=0)
    write = saving.snapshot_training(tmp_path, state, tower, {"items": table}, Worker(rank, 2))
    assert calls == ["weights", "optimizer_state", *["table"] * (rank == 0)]
    assert (write is None) == (rank == 1)
    if write is not None:
        assert write().name == "step-00000005"
