"""Small pairs of users and items, and trainings of models of such pairs on one or several workers."""

from __future__ import annotations

from collections.abc import Mapping
from datetime import timedelta
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor

from findrec.config import RunConfig, parse_config
from findrec.datasets.batches.edges import Edges
from findrec.datasets.batches.training_pairs import TrainingPairs
from findrec.datasets.folder.data_folder import DataFolder
from findrec.evaluation.validation import validate
from findrec.models.base import DataFacts
from findrec.training.build import build_tables, build_tower_model
from findrec.training.loop import run_training
from findrec.training.tower import PlainTower
from findrec.training.worker import Worker

ITEMS_OF_USERS = [[1, 2, 5], [2, 3], [], [1, 5, 7, 8], [4], [8, 2]]  # the third user has no pairs
NUM_USERS, NUM_ITEMS = len(ITEMS_OF_USERS), 9  # items 6 and 9 have none either


def pairs() -> TrainingPairs:
    """The pairs of `ITEMS_OF_USERS`."""
    sizes = [len(items) for items in ITEMS_OF_USERS]
    item = np.concatenate([np.array(sorted(items), dtype=np.int64) for items in ITEMS_OF_USERS])
    user = np.repeat(np.arange(NUM_USERS), sizes)
    return TrainingPairs(user, item, np.concatenate([[0], np.cumsum(sizes)]), np.unique(item))


def matrix() -> Tensor:
    """The pairs as `[U, V]` with padding, float64."""
    dense = torch.zeros(NUM_USERS + 1, NUM_ITEMS + 1, dtype=torch.float64)
    for user, items in enumerate(ITEMS_OF_USERS, start=1):
        dense[user, items] = 1
    return dense


def facts(feature_dims: Mapping[str, int] | None = None) -> DataFacts:
    """What a model of these pairs is built for."""
    return DataFacts(NUM_ITEMS, NUM_USERS, feature_dims or {}, training_pairs=pairs)


def edges() -> Edges:
    """All pairs, each with two fixed negatives."""
    made = pairs()
    negative = torch.tensor([[3, 8], [4, 7], [1, 3], [5, 1], [8, 4], [2, 4], [3, 3], [4, 2], [2, 3]])
    negative = torch.cat([negative, torch.tensor([[1, 2], [3, 5], [7, 1]])])
    return Edges(torch.from_numpy(made.user + 1), torch.from_numpy(made.item), negative)


def training_config(model: Mapping[str, Any], **training: Any) -> RunConfig:
    """A short training of a model."""
    keys = {"microbatches": 2, "tokens": 64, "optim": {"lr": 0.02, "weight_decay": 0.0}} | training
    tree = {"data": {"max_length": 16}, "model": dict(model), "training": keys}
    return parse_config(tree)


def train(config: RunConfig, folder: DataFolder, checkpoints: Path, worker: Worker) -> None:
    """One training to its end, without DeepSpeed."""
    torch.manual_seed(config.training.seed)
    tower = PlainTower(build_tower_model(config, folder), config.training.optim)
    tables = build_tables(config, folder)
    run_training(config, folder, checkpoints, tower, tables, worker=worker, validate=validate)


def work(
    rank: int, world: int, meeting: str, data: str, out: str, model: dict[str, Any], training: dict[str, Any]
) -> None:
    """One of several workers, of a model without weights besides its tables."""
    torch.set_num_threads(1)
    dist.init_process_group(
        "gloo", init_method=f"file://{meeting}", rank=rank, world_size=world, timeout=timedelta(seconds=60)
    )
    config = training_config(model, **training)
    train(config, DataFolder.open(data), Path(out), Worker(rank, world))
    dist.barrier()
    dist.destroy_process_group()
