"""Measures the implementations of one op at several shapes: time in alternating runs, memory separately."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from bench.memory import peak_bytes, peak_cuda_bytes
from bench.rows import Row

from findrec.progress import progress
from findrec.timer import time_alternating

MakeRun = Callable[..., Callable[[], object]]


@dataclass(frozen=True)
class Case:
    """One shape of an op."""

    shape: Sequence[Any]
    label: str
    baselines: Sequence[str]
    ours: Sequence[str]
    runs: int


def compare(
    op: str, cases: Sequence[Case], make_run: MakeRun, make_measured_run: MakeRun | None = None
) -> list[Row]:
    """Measure, for each case, every baseline, and each of `ours` against each baseline (float32 rows).

    `make_run(impl, shape, device)` returns the function to time. CPU memory is measured in a fresh process
    with the function returned by `make_measured_run` (default: `make_run`), which must be importable.
    """
    rows = []
    with progress(op.replace("_", " "), total=len(cases), unit="shapes") as bar:
        for case in cases:
            rows += _compare_case(op, case, make_run, make_measured_run or make_run)
            bar.advance()
    return rows


def _compare_case(op: str, case: Case, make_run: MakeRun, make_measured_run: MakeRun) -> list[Row]:
    device = "cuda" if torch.cuda.is_available() else "cpu"
    functions = {impl: make_run(impl, case.shape, device) for impl in (*case.baselines, *case.ours)}
    wait = torch.cuda.synchronize if device == "cuda" else lambda: None
    timings = time_alternating(functions, runs=case.runs, wait=wait)
    if device == "cuda":
        peaks = {impl: peak_cuda_bytes(function) for impl, function in functions.items()}
    else:
        del functions  # frees their inputs for the measured processes
        peaks = {impl: peak_bytes(make_measured_run, impl, case.shape, device) for impl in timings}
    pairs = [(name, name) for name in case.baselines]
    pairs += [(impl, name) for impl in case.ours for name in case.baselines]
    return [
        Row(
            op=op,
            shape=case.label,
            dtype="float32",
            impl=impl,
            baseline=baseline,
            median_s=timings[impl].median_s,
            p10_s=timings[impl].p10_s,
            peak_bytes=peaks[impl],
            ratio=timings[baseline].median_s / timings[impl].median_s,
        )
        for impl, baseline in pairs
    ]
