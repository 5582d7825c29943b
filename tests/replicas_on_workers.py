"""What a worker does in the test of copies of weights: the same updates, with a bit flipped on one worker."""

from contextlib import nullcontext
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import nn

from findrec.config import LossConfig, OptimConfig, parse_config
from findrec.errors import FindRecError
from findrec.tables.item_table import ItemTable
from findrec.tables.sharded_table import ShardedItemTable
from findrec.tables.table_spec import TableSpec
from findrec.training.checkpoints.checkpoint import TrainState
from findrec.training.checkpoints.manager import CheckpointManager
from findrec.training.tower import PlainTower
from findrec.training.worker import Worker

CASES = {  # the worker with the flipped bit, where it is, the error
    "equal": (None, None, None),
    "row": (1, "users", r"copies of table 'users' \(weight\) are not equal .* step 5: rank 1 of 3 differs"),
    "moment": (0, "exp_avg_sq", r"copies of table 'users' \(exp_avg_sq\) .*: rank 0 of 3 differs"),
    "tower": (2, "tower", r"copies of the weights 'weight' are not equal .*: rank 2 of 3 differs"),
}


def work(rank, world, meeting, folder):
    """One worker: saves a checkpoint in each case; the error is the same on all workers."""
    torch.set_num_threads(1)
    dist.init_process_group(
        "gloo", init_method=f"file://{meeting}", rank=rank, world_size=world, timeout=timedelta(seconds=60)
    )
    for case, (altered, where, message) in CASES.items():
        torch.manual_seed(0)
        model: Any = nn.Linear(5, 3)
        tower = PlainTower(model, OptimConfig())
        specs = [
            TableSpec(20, 5, seed=1, loss=LossConfig(), optim=OptimConfig(), name=n)
            for n in ("items", "users")
        ]
        tables = {"items": ShardedItemTable(specs[0]), "users": ItemTable(specs[1])}
        if rank == altered:
            rows = tables["users"].state()
            places = {
                "users": rows["weight"],
                "exp_avg_sq": rows["exp_avg_sq"],
                "tower": model.weight,
            }
            places[where].detach().view(torch.int32)[2, 3] ^= 1
        state = TrainState(epoch=1, step=5, plan="p", best=0.5, best_step=5, stale=0)
        root = Path(folder) / case
        manager = CheckpointManager(parse_config({}), root, tower, tables, Worker(rank, world))
        expected = pytest.raises(FindRecError, match=message) if message else nullcontext()
        with expected:
            manager.save(state)
        dist.barrier()
        assert (root / "step-00000005").exists() == (message is None)
        manager.close()
    dist.barrier()
    dist.destroy_process_group()
