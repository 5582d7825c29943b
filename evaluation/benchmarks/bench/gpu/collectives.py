"""Two processes that reduce a tensor, with NCCL on one or two cards (gloo without one)."""

from __future__ import annotations

import json
import os
import tempfile
from collections.abc import Iterator
from datetime import timedelta
from pathlib import Path

import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from bench.gpu.kernels import reason
from bench.gpu.setting import Figures, Setting, row

from findrec.timer import time_alternating

WORLD = 2


def bench_two_processes(setting: Setting) -> Iterator[Figures]:
    """The bandwidth of all-reduce. On one card NCCL below 2.30 refuses two processes, which is then said."""
    # NCCL 2.30 and newer allow two processes on one card with this variable; older ones do not know it.
    os.environ["NCCL_MULTI_RANK_GPU_ENABLE"] = "1"
    # The device is not asked here: these processes inherit nothing of CUDA.
    size = 2**16 if setting.small else 2**28
    backend = "nccl" if setting.device == "cuda" else "gloo"
    with tempfile.TemporaryDirectory(prefix="findrec-") as folder:
        try:
            mp.spawn(_reduce, (folder, backend, size, setting.runs), nprocs=WORLD)  # type: ignore[no-untyped-call]
        except Exception as error:
            yield row(f"all-reduce, {backend}", f"{size / 2**20:g} MiB", None, "GB/s", note=_refusal(error))
            return
        result = json.loads((Path(folder) / "result.json").read_text())
    # Each process of a ring sends and receives 2 (W - 1) / W of the tensor.
    sent = 2 * (WORLD - 1) / WORLD * size
    yield row(
        f"all-reduce, {backend}, {WORLD} processes on {result['devices']}",
        f"{size / 2**20:g} MiB",
        sent / result["seconds"] / 1e9,
        "GB/s",
        note="right sums" if result["right"] else "WRONG SUMS",
    )


def _refusal(error: Exception) -> str:
    text = str(error)
    if "Duplicate GPU" in text or "same GPU" in text:
        return "this NCCL refuses two processes on one card (2.30 and newer allow it)"
    return reason(RuntimeError((text.strip().splitlines() or [""])[-1]))


def _reduce(rank: int, folder: str, backend: str, size: int, runs: int) -> None:
    device = torch.device("cpu")
    devices = "the CPU"
    if backend == "nccl":
        device = torch.device("cuda", rank % torch.cuda.device_count())
        torch.cuda.set_device(device)
        devices = "one card" if torch.cuda.device_count() < WORLD else "two cards"
    dist.init_process_group(
        backend,
        init_method=f"file://{folder}/rendezvous",
        rank=rank,
        world_size=WORLD,
        timeout=timedelta(seconds=40),
    )
    try:
        values = torch.full((size // 4,), float(rank + 1), device=device)
        dist.all_reduce(values)
        right = bool((values == sum(range(1, WORLD + 1))).all())
        wait = torch.cuda.synchronize if backend == "nccl" else lambda: None
        timing = time_alternating({"all": lambda: dist.all_reduce(values)}, runs=runs, wait=wait)["all"]
        if rank == 0:
            result = {"seconds": timing.median_s, "right": right, "devices": devices}
            (Path(folder) / "result.json").write_text(json.dumps(result))
    finally:
        dist.destroy_process_group()
