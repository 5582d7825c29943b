"""Measures the memory use of the workers of a training."""

from __future__ import annotations

import resource
import sys

import psutil
import torch

from findrec.training.worker import Worker, largest_of_workers

_PEAK_UNIT = 1 if sys.platform == "darwin" else 1024  # bytes of a unit of ru_maxrss


def memory_values(worker: Worker) -> dict[str, float]:
    """Current and peak memory and peak GPU memory in GiB, of the worker that uses most (a collective call).

    Peaks are of the whole life of the worker's process, which also trains the earlier stages.
    """
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * _PEAK_UNIT
    values = {
        "memory/worker_gib": float(psutil.Process().memory_info().rss),
        "memory/worker_peak_gib": float(peak),
    }
    if worker.device.type == "cuda":
        values["memory/gpu_peak_gib"] = float(torch.cuda.max_memory_allocated(worker.device))
    largest = largest_of_workers(list(values.values()), worker, "memory in use")
    return {name: value / 2**30 for name, value in zip(values, largest, strict=True)}
