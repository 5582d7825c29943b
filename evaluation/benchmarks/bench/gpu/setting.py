"""What the sections of the GPU benchmark share: where and how they measure, and the peaks of the card."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from findrec.timer import Timing, time_alternating

Figures = dict[str, Any]
COPY, MATMUL = "copy bandwidth", "matmul, {}"


@dataclass(frozen=True)
class Setting:
    """Where a section measures; `small` sizes are for a rehearsal. Results are in the folder `out`."""

    device: str
    small: bool
    out: Path

    @property
    def runs(self) -> int:
        """Timed runs of each function."""
        return 2 if self.small else 11

    def wait(self) -> None:
        """Wait for the device."""
        if self.device == "cuda":
            torch.cuda.synchronize()

    @property
    def patience(self) -> float:
        """What time limits are multiplied by: they are those of a GPU."""
        return 1.0 if self.device == "cuda" else 4.0

    def time(self, functions: Mapping[str, Callable[[], object]], warmup: int = 2) -> dict[str, Timing]:
        """Time functions in alternating runs."""
        return time_alternating(functions, runs=self.runs, warmup=warmup, wait=self.wait)

    def peak_mib(self, function: Callable[[], object]) -> float | None:
        """Memory that one run adds on the GPU; None on a CPU."""
        from bench.memory import peak_cuda_bytes

        return peak_cuda_bytes(function) / 2**20 if self.device == "cuda" else None

    def rows_of(self, section: str) -> list[Figures]:
        """What a section of this or an earlier process has measured so far."""
        path = self.out / f"{section}.jsonl"
        return [json.loads(line) for line in path.read_text().splitlines()] if path.is_file() else []

    def share(self, value: float, peak: str) -> Figures:
        """The share of a measured peak of the card (`COPY`, or `MATMUL` with a type) that `value` is."""
        for row in self.rows_of("card"):
            if row["what"] == peak and row["value"]:
                return {"share": value / row["value"], "of": peak}
        return {}


def kill_tree(pid: int) -> None:
    """Kill a process and all that it started, in whatever session."""
    import psutil

    with contextlib.suppress(psutil.NoSuchProcess):
        parent = psutil.Process(pid)
        for process in [parent, *parent.children(recursive=True)]:
            with contextlib.suppress(psutil.NoSuchProcess):
                process.kill()


def row(what: str, shape: str, value: float | None, unit: str, **more: Any) -> Figures:
    """One figure; `more`: `seconds`, `peak_mib`, `share` with `of`, `times` with `against`, `note`."""
    return {"what": what, "shape": shape, "value": value, "unit": unit} | {
        name: given for name, given in more.items() if given is not None
    }
