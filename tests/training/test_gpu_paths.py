"""A whole training with the code that is chosen on a GPU: it learns, and continues bit for bit."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from gpu_paths import gpu_paths
from planted import make_config, planted_folder

from findrec.config import RunConfig
from findrec.datasets.folder.data_folder import DataFolder
from findrec.evaluation.validation import validate
from findrec.training.build import build_tables, build_tower_model
from findrec.training.checkpoints.checkpoint import latest_checkpoint, list_checkpoints, read_state
from findrec.training.loop import run_training
from findrec.training.tower import PlainTower
from findrec.training.worker import Worker

SAMPLED = {"loss": {"kind": "sampled", "negatives": 32}}


class StoppedError(Exception):
    pass


class Log:
    """Keeps losses and validations, and stops the training at a step."""

    def __init__(self, stop: int = 0) -> None:
        self.losses: list[float] = []
        self.ndcg: list[float] = []
        self.stop = stop

    def log(self, step: int, epoch: int, values: Mapping[str, float]) -> None:
        if "train/loss" in values:
            self.losses.append(values["train/loss"])
        if "valid/ndcg@10" in values:
            self.ndcg.append(values["valid/ndcg@10"])
        if step == self.stop:
            raise StoppedError


def train(
    config: RunConfig, folder: DataFolder, path: Path, log: Log, device: str = "cpu"
) -> dict[str, torch.Tensor]:
    """All weights, and the state of the item table, after a training."""
    torch.manual_seed(config.training.seed)
    tower = PlainTower(build_tower_model(config, folder).to(device), config.training.optim)
    tables = build_tables(config, folder, device)
    worker = Worker(device=torch.device(device))
    run_training(config, folder, path, tower, tables, worker=worker, validate=validate, log=log)
    return tower.weights() | tower.optimizer_state() | dict(tables["items"].state())


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> DataFolder:
    return planted_folder(tmp_path_factory.mktemp("planted") / "data", num_users=50)


@pytest.mark.parametrize(
    "training",
    [{"precision": "bfloat16"}, {"precision": "bfloat16", **SAMPLED}, {"table": "sharded"}],
    ids=["exact", "sampled", "sharded"],
)
def test_an_interrupted_training_ends_like_an_uninterrupted_one(
    folder: DataFolder, tmp_path: Path, training: dict[str, Any]
) -> None:
    config = make_config(epochs=3, save_steps=3, keep=99, microbatches=2, **training)
    whole, cut, rest = Log(), Log(stop=8), Log()
    with gpu_paths():
        want = train(config, folder, tmp_path / "whole", whole)
        with pytest.raises(StoppedError):
            train(config, folder, tmp_path / "cut", cut)
        saved = read_state(latest_checkpoint(tmp_path / "cut"))
        assert saved.step == 6
        got = train(config, folder, tmp_path / "cut", rest)
    assert rest.losses == whole.losses[saved.step :]
    assert whole.ndcg[-1] == rest.ndcg[-1] > 0.25
    assert whole.losses[-1] < 0.8 * whole.losses[0]
    assert want.keys() == got.keys()
    for name, value in want.items():
        assert torch.equal(got[name], value), name
    last = [list_checkpoints(tmp_path / run)[-1] for run in ("whole", "cut")]
    files = [{file.name: file.read_bytes() for file in path.iterdir()} for path in last]
    assert files[0] == files[1]


@pytest.mark.parametrize("training", [{}, SAMPLED], ids=["exact", "sampled"])
def test_the_training_is_that_of_the_cpu_but_for_rounding(
    folder: DataFolder, tmp_path: Path, training: dict[str, Any]
) -> None:
    config = make_config(epochs=1, microbatches=2, **training)
    here, there = Log(), Log()
    want = train(config, folder, tmp_path / "cpu", here)
    with gpu_paths():
        got = train(config, folder, tmp_path / "gpu", there)
    assert there.losses == pytest.approx(here.losses, rel=1e-4)
    for name, value in want.items():
        torch.testing.assert_close(got[name], value, rtol=1e-2, atol=1e-4, msg=lambda m, n=name: f"{n}: {m}")
    assert any(not torch.equal(got[name], value) for name, value in want.items()), "the same code ran"


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("training", [{}, SAMPLED, {"table": "sharded"}], ids=["exact", "sampled", "sharded"])
def test_on_a_gpu_a_training_is_that_of_the_cpu_and_continues(
    folder: DataFolder, tmp_path: Path, training: dict[str, Any]
) -> None:
    config = make_config(epochs=2, save_steps=3, keep=99, microbatches=2, **training)
    cpu, whole, cut, rest = Log(), Log(), Log(stop=8), Log()
    train(config, folder, tmp_path / "cpu", cpu)
    train(config, folder, tmp_path / "whole", whole, "cuda")
    assert whole.losses == pytest.approx(cpu.losses, rel=1e-2)
    with pytest.raises(StoppedError):
        train(config, folder, tmp_path / "cut", cut, "cuda")
    train(config, folder, tmp_path / "cut", rest, "cuda")
    assert rest.losses == pytest.approx(whole.losses[6:], rel=1e-2)
    assert rest.ndcg[-1] == pytest.approx(whole.ndcg[-1], abs=0.05)
