"""What a worker does in the test of the memory that is logged."""

import json
from datetime import timedelta
from pathlib import Path

import psutil
import torch
import torch.distributed as dist

from findrec.training.memory import memory_values
from findrec.training.worker import Worker


def work(rank, world, meeting, out, mib):
    """One worker holds `mib` times its rank, and writes what is logged."""
    dist.init_process_group(
        "gloo", init_method=f"file://{meeting}", rank=rank, world_size=world, timeout=timedelta(seconds=60)
    )
    held = torch.ones(rank * mib << 18)
    logged = memory_values(Worker(rank, world))
    own = psutil.Process().memory_info().rss / 2**30
    assert len(held) == rank * mib << 18  # held until now
    del held
    after = memory_values(Worker(rank, world))
    Path(f"{out}.{rank}").write_text(json.dumps([logged, own, after]))
    dist.barrier()
    dist.destroy_process_group()
