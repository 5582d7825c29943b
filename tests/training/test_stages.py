"""Stages of every kind of examples in the one loop, several tables in a run, and a model of two stages."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from forked import forked
from planted import planted_folder
from stages_on_workers import stage_config, train, work
from torch import Tensor

from findrec.datasets.folder.data_folder import DataFolder
from findrec.errors import FindRecError
from findrec.models.base import DataFacts
from findrec.models.registry import build_model
from findrec.tables.base import ITEMS
from findrec.training.build import build_tables, build_tower_model
from findrec.training.checkpoints.checkpoint import Checkpoint, latest_checkpoint, load_checkpoint
from findrec.training.checkpoints.validations import METRICS, find_artifacts
from findrec.training.loop import run_training
from findrec.training.resume import restore
from findrec.training.runs import main_job, open_run_folder, training_jobs
from findrec.training.tower import PlainTower
from findrec.training.worker import Worker

STAGES = {"edges": "TwoTables", "items": "ReadsText", "candidates": "Judge", "no tables": "NoTables"}
EPOCHS = {"edges": 6, "items": 40, "candidates": 6, "no tables": 40}
TOKENS = {"edges": 32, "items": 32, "candidates": 256, "no tables": 32}
LEARNT = {"edges": 0.65, "items": 0.7, "candidates": 0.6, "no tables": 0.99}  # last losses over the first


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> DataFolder:
    made: DataFolder = planted_folder(tmp_path_factory.mktemp("planted") / "data", num_users=40)
    return made


class StoppedError(Exception):
    """A training that is cut short."""


class Log:
    """The losses of the steps; with `stop` training ends after that step is logged."""

    def __init__(self, stop: int = 0) -> None:
        self.losses: list[float] = []
        self._stop = stop

    def log(self, step: int, epoch: int, values: Mapping[str, float]) -> None:
        if "train/loss" in values:
            self.losses.append(values["train/loss"])
            if step == self._stop:
                raise StoppedError


def newest(checkpoints: Path) -> Checkpoint:
    path = latest_checkpoint(checkpoints)
    assert path is not None
    return load_checkpoint(path)


def numbers(saved: Checkpoint) -> dict[str, Tensor]:
    """All weights and the optimizer's state, of the tower and of every table."""
    tables = {f"{t}/{name}": table[name] for t, table in saved.tables.items() for name in table}
    return {**saved.tower, **saved.optimizer_state, **tables}


@pytest.mark.parametrize("kind", STAGES)
def test_a_stage_of_each_kind_learns_and_resumes_inside_an_epoch(
    folder: DataFolder, tmp_path: Path, kind: str
) -> None:
    config = stage_config(STAGES[kind], epochs=EPOCHS[kind], save_steps=2, tokens=TOKENS[kind])
    whole, cut, rest = Log(), Log(stop=3), Log()
    train(config, folder, tmp_path / "whole", whole)
    with pytest.raises(StoppedError):
        train(config, folder, tmp_path / "cut", cut)
    saved = newest(tmp_path / "cut").state.step
    train(config, folder, tmp_path / "cut", rest)
    assert 0 < saved < len(whole.losses)
    assert rest.losses == whole.losses[saved:]
    wanted, result = numbers(newest(tmp_path / "whole")), numbers(newest(tmp_path / "cut"))
    assert result.keys() == wanted.keys()
    assert all(torch.equal(result[name], value) for name, value in wanted.items())
    tail = sum(whole.losses[-4:]) / 4
    assert tail < LEARNT[kind] * whole.losses[0]


def test_a_checkpoint_holds_the_tables_a_model_has(folder: DataFolder, tmp_path: Path) -> None:
    for kind, tables in {"edges": [ITEMS, "users"], "items": [ITEMS], "no tables": []}.items():
        train(stage_config(STAGES[kind], epochs=1), folder, tmp_path / kind, Log())
        assert list(newest(tmp_path / kind).tables) == tables
    saved = newest(tmp_path / "edges")
    assert saved.tables["users"].num_rows == folder.num_users + 1
    assert saved.tower == {}
    rows = saved.tables["users"]["weight"]
    assert not rows[0].any()
    assert not torch.equal(rows[1:31], saved.table["weight"][1:31])  # tables start with different rows


@pytest.mark.parametrize("world", [2])
def test_several_tables_are_the_same_however_rows_are_placed(
    folder: DataFolder, tmp_path: Path, world: int
) -> None:
    """Two tables on two workers, replicated and sharded, whole and resumed: as on one worker."""
    train(stage_config("TwoTables", epochs=2), folder, tmp_path / "one", Log())
    wanted = numbers(newest(tmp_path / "one"))
    with forked(work, world, str(tmp_path / "meeting"), str(folder.path), str(tmp_path)):
        pass
    for placement in ("replicated", "sharded"):
        whole, resumed = (newest(tmp_path / f"{placement}-{how}") for how in ("whole", "cut"))
        files = sorted(path.name for path in whole.path.glob("table*"))
        assert len(files) == (2 if placement == "replicated" else 2 * world), files
        result, again = numbers(whole), numbers(resumed)
        for name, value in wanted.items():
            torch.testing.assert_close(
                result[name], value, rtol=1e-4, atol=1e-6, msg=lambda m, n=name: f"{n}: {m}"
            )
            assert torch.equal(again[name], result[name]), (placement, name)


def two_stages(tmp_path: Path, **training: Any) -> Any:
    config = stage_config("TwoStages", epochs=2, **training)
    evaluation = config.evaluation.model_copy(update={"baselines": []})
    return config.model_copy(update={"runs": str(tmp_path), "name": "r", "evaluation": evaluation})


def test_a_stage_starts_from_the_one_it_continues(folder: DataFolder, tmp_path: Path) -> None:
    """From its best weights and rows, with the moments of a new training and its own learning rate."""
    config = stage_config("Continued", epochs=1).model_copy(update={"runs": str(tmp_path), "name": "r"})
    first, second = training_jobs(config, tmp_path)[:2]  # the others are baselines
    assert (first.continues, second.continues) == (None, "first")
    assert first.config.training.optim.lr == 0.005
    assert first.config.training.optim.weight_decay == config.training.optim.weight_decay == 0
    assert second.config.training == config.training
    torch.manual_seed(0)
    tower = PlainTower(build_tower_model(first.config, folder), first.config.training.optim)
    tables = build_tables(first.config, folder)
    quiet: dict[str, Any] = {"worker": Worker(), "validate": lambda *_: dict.fromkeys(METRICS, 0.0)}
    run_training(first.config, folder, first.folder / "checkpoints", tower, tables, **quiet)
    tower = PlainTower(build_tower_model(second.config, folder), second.config.training.optim)
    tables = build_tables(second.config, folder)
    earlier = find_artifacts(config, second.needs)["first"]
    saved = load_checkpoint(earlier)
    state = restore(second.config, folder, second.folder / "checkpoints", tower, tables, "plan", earlier)
    assert (state.epoch, state.step) == (0, 0)
    assert state.started_from.startswith(str(earlier))
    assert all(torch.equal(value, saved.tower[name]) for name, value in tower.weights().items())
    assert torch.equal(tables[ITEMS].weight, saved.table["weight"])
    assert not any(value.any() for name, value in tables[ITEMS].state().items() if name != "weight")


def test_a_model_of_two_stages_is_two_trainings_of_one_run(folder: DataFolder, tmp_path: Path) -> None:
    config = two_stages(tmp_path)
    run = open_run_folder(config)
    first, second = training_jobs(config, run)
    assert (first.name, second.name) == ("TwoStages/edges", "TwoStages")
    assert (first.ranked, second.ranked) == (False, True)
    assert first.config.training.epochs == 3
    assert main_job(config, run) == second
    assert second.needs == {"edges": first.folder}
    with pytest.raises(FindRecError, match="'edges' that is needed has no usable checkpoint"):
        find_artifacts(config, second.needs)
    train(first.config, folder, first.folder / "checkpoints", Log())
    artifacts = find_artifacts(config, second.needs)
    facts = DataFacts(folder.num_items, artifacts=artifacts)
    model = build_model(second.config.model, facts)
    assert torch.equal(model.get_buffer("prepared_Vd"), newest(first.folder / "checkpoints").table["weight"])
