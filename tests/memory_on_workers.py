"""What a worker does in the test of the memory that is logged."""

from datetime import timedelta
from pathlib import Path

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
    logged = memory_values(Worker(rank, world))["memory/worker_gib"]
    assert logged * 2**30 >= held.nbytes
    Path(f"{out}.{rank}").write_text(str(logged))
    dist.barrier()
    dist.destroy_process_group()
