"""What a worker does in the test of hangs: collective calls that return at once, the last one joined late."""

import json
import sys
import time
from dataclasses import asdict
from datetime import timedelta
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
import torch.distributed as dist

from findrec.cluster import heartbeat
from findrec.files import replacing
from findrec.tables.collectives import COLLECTIVES
from findrec.tables.exchange import Shards

CALLS = 6  # two for each sum, as it consists of another


def work(rank, world, meeting, folder, late):
    """One worker; `late` waits for the file `go` before the last sum. Each writes its status all the time."""
    torch.set_num_threads(1)
    dist.init_process_group(
        "gloo", init_method=f"file://{meeting}", rank=rank, world_size=world, timeout=timedelta(seconds=60)
    )
    pending, reduce_now = [], dist.all_reduce

    def reduce_later(x: Any, op: Any, group: Any = None) -> Any:
        pending.append(reduce_now(x, op, group, async_op=True))

    communication: Any = dist
    communication.all_reduce = reduce_later
    ray: Any = SimpleNamespace(get=lambda stop, timeout: stop)
    sys.modules["ray"] = ray
    heartbeat.BEAT_S = 0.02

    def write(status):
        with replacing(Path(folder) / f"status-{rank}.json") as part:
            part.write_text(json.dumps(asdict(status)))
        return False

    registry = SimpleNamespace(beat=SimpleNamespace(remote=write))
    beats = heartbeat.ReportingHeartbeat(registry, rank, "node", asynchronous=True)
    for step in (1, 2, 3):
        beats.tick(step)
        while step == 3 and rank == late and not (Path(folder) / "go").exists():
            time.sleep(0.01)
        total = torch.ones(())
        with COLLECTIVES.call("sum of the losses"):
            Shards(0).all_reduce(total, dist.ReduceOp.SUM)
        pending.pop().wait()  # as `total.item()` would on a GPU
        assert total == world
    dist.barrier()
    dist.destroy_process_group()
