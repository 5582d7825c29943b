"""The rows of one op at one shape: every implementation timed in turn with the baseline, memory apart."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch

from findrec.bench.memory import peak_bytes, peak_cuda_bytes
from findrec.bench.rows import Row
from findrec.bench.timer import time_alternating

MakeRun = Callable[..., Callable[[], object]]


def compare(
    op: str, label: str, make_run: MakeRun, impls: Sequence[str], shape: Sequence[Any], *, runs: int = 11
) -> list[Row]:
    """One float32 row for each of `impls`, the first of which is the baseline.

    `make_run(impl, shape, device)` returns the function to time. It must be importable: its memory on the
    CPU is measured in a fresh process.
    """
    device = "cuda" if torch.cuda.is_available() else "cpu"
    functions = {impl: make_run(impl, shape, device) for impl in impls}
    wait = torch.cuda.synchronize if device == "cuda" else lambda: None
    timings = time_alternating(functions, runs=runs, wait=wait)
    return [
        Row(
            op=op,
            shape=label,
            dtype="float32",
            impl=impl,
            baseline=impls[0],
            median_s=timing.median_s,
            p10_s=timing.p10_s,
            peak_bytes=peak_cuda_bytes(functions[impl])
            if device == "cuda"
            else peak_bytes(make_run, impl, shape, device),
            ratio=timings[impls[0]].median_s / timing.median_s,
        )
        for impl, timing in timings.items()
    ]
