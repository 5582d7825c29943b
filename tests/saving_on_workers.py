"""What a worker does in the tests of saving."""

from contextlib import nullcontext
from datetime import timedelta
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import torch.distributed as dist

from findrec.config import LossConfig, OptimConfig
from findrec.tables.sharded_table import ShardedItemTable
from findrec.tables.table_spec import TableSpec
from findrec.training.checkpoints import saving
from findrec.training.checkpoints.checkpoint import TrainState
from findrec.training.worker import Worker

SPEC = TableSpec(20, 4, seed=1, loss=LossConfig(), optim=OptimConfig())
STATE = TrainState(epoch=1, step=5, plan="p", best=0.5, best_step=5, stale=0)


def work(rank, world, meeting, roots, full):
    """One worker saves a checkpoint below its root; with `full` the disk is, and it expects the error."""
    torch.set_num_threads(1)
    dist.init_process_group(
        "gloo", init_method=f"file://{meeting}", rank=rank, world_size=world, timeout=timedelta(seconds=60)
    )
    tower = SimpleNamespace(optimizer_state=dict, weights=dict)
    saving.TABLE_FILE_BYTES = 4 * 3 * 4 * 4  # four rows
    if full and rank == full - 1:

        def no_room(*_):
            raise OSError("No space left on device")

        saving.save_rows = no_room
    root = Path(roots[rank])
    expected = pytest.raises(OSError, match="No space left") if full else nullcontext()
    with expected:
        saving.save_training(root, STATE, tower, {"items": ShardedItemTable(SPEC)}, Worker(rank, world))
    dist.barrier()
    assert (root / "step-00000005").exists() == (not full and root.name == "disk0")
    dist.barrier()
    dist.destroy_process_group()
