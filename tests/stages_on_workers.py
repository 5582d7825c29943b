"""Trains a toy stage in this process, and what a worker does in the test of several tables."""

from __future__ import annotations

import contextlib
from collections.abc import Mapping
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from findrec.config import RunConfig, parse_config
from findrec.datasets.folder.data_folder import DataFolder
from findrec.training.build import build_tables, build_tower_model
from findrec.training.loop import StepLog, run_training
from findrec.training.tower import PlainTower
from findrec.training.worker import Worker


def stage_config(model: str, **training: Any) -> RunConfig:
    """A short training of a model in `toy_models`."""
    keys = {"microbatches": 4, "tokens": 32, "optim": {"lr": 0.02, "weight_decay": 0.0}} | training
    system: dict[str, Any] = {"name": f"toy_models:{model}", "dim": 16}
    if model == "TwoStages":
        system["stage_epochs"] = 3
    return parse_config({"data": {"max_length": 16}, "model": system, "training": keys})


def never(*_: object, **__: object) -> Mapping[str, float]:
    """The validation of stages that are not ranked."""
    raise AssertionError("a stage that is not ranked is not validated")


def train(
    config: RunConfig,
    folder: DataFolder,
    checkpoints: Path,
    log: StepLog | None,
    worker: Worker | None = None,
    after_epoch: Any = None,
) -> None:
    """One training to its end, without DeepSpeed."""
    torch.manual_seed(config.training.seed)
    tower = PlainTower(build_tower_model(config, folder), config.training.optim)
    tables = build_tables(config, folder)
    run_training(
        config,
        folder,
        checkpoints,
        tower,
        tables,
        worker=worker or Worker(),
        validate=never,
        log=log,
        after_epoch=after_epoch,
    )


class _StoppedError(Exception):
    pass


def _stop(values: object) -> None:
    raise _StoppedError


def work(rank: int, world: int, meeting: str, data: str, out: str) -> None:
    """One worker: the stage of two tables in both placements, whole, and cut after an epoch and resumed.

    The model has no weights beside its tables, so workers need nothing but these to agree.
    """
    torch.set_num_threads(1)
    dist.init_process_group(
        "gloo", init_method=f"file://{meeting}", rank=rank, world_size=world, timeout=timedelta(seconds=60)
    )
    folder, worker = DataFolder.open(data), Worker(rank, world)
    for placement in ("replicated", "sharded"):
        config = stage_config("TwoTables", epochs=2, table=placement)
        train(config, folder, Path(out) / f"{placement}-whole", None, worker)
        cut = Path(out) / f"{placement}-cut"
        with contextlib.suppress(_StoppedError):
            train(config, folder, cut, None, worker, after_epoch=_stop)
        train(config, folder, cut, None, worker)
    dist.barrier()
    dist.destroy_process_group()
