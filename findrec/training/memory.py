"""Measures the memory use of the workers of a training."""

from __future__ import annotations

import psutil
import torch
import torch.distributed as dist

from findrec.tables.collectives import COLLECTIVES
from findrec.training.worker import Worker


def memory_values(worker: Worker) -> dict[str, float]:
    """Current memory and peak GPU memory in GiB, of the worker that uses most (a collective call)."""
    values = {"memory/worker_gib": float(psutil.Process().memory_info().rss)}
    if worker.device.type == "cuda":
        values["memory/gpu_peak_gib"] = float(torch.cuda.max_memory_allocated(worker.device))
    largest = torch.tensor(list(values.values()), dtype=torch.float64, device=worker.device)
    if worker.world > 1:
        with COLLECTIVES.call("memory in use"):
            dist.all_reduce(largest, dist.ReduceOp.MAX)
    return {name: value / 2**30 for name, value in zip(values, largest.tolist(), strict=True)}
