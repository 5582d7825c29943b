"""Benchmark results as rows: one JSON object each, with the machine they were measured on, and a table."""

from __future__ import annotations

import argparse
import json
import os
import platform
import time
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from rich.console import Console
from rich.table import Table

from findrec import __version__


@dataclass(frozen=True)
class Row:
    """One implementation at one shape; `ratio` is the baseline's median over ours: above 1 is faster."""

    op: str
    shape: str
    dtype: str
    impl: str
    baseline: str
    median_s: float
    p10_s: float
    peak_bytes: int
    ratio: float


def machine() -> dict[str, object]:
    """What a reader needs to know to place the numbers."""
    import torch

    return {
        "findrec": __version__,
        "torch": torch.__version__,
        "python": platform.python_version(),
        "cpu": _cpu_name(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
        "date": time.strftime("%Y-%m-%d"),
    }


def _cpu_name() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor()
    return next((line.split(":")[1].strip() for line in lines if line.startswith("model name")), "unknown")


def write_json(rows: Iterable[Row], path: Path) -> None:
    """Write `{"machine": ..., "rows": [...]}`, one row a line so that versions can be compared."""
    body = ",\n".join(f"  {json.dumps(asdict(row))}" for row in rows)
    path.write_text(f'{{"machine": {json.dumps(machine())},\n "rows": [\n{body}\n ]}}\n')


def read_json(path: Path) -> list[Row]:
    """The rows of a file written by `write_json`."""
    return [Row(**row) for row in json.loads(path.read_text())["rows"]]


def make_table(rows: Iterable[Row]) -> Table:
    """A table for people: milliseconds, MiB, and how many times faster than the baseline."""
    table = Table(title="one run, forward and backward")
    for name in ("op", "shape", "dtype", "impl", "baseline"):
        table.add_column(name)
    for name in ("median ms", "p10 ms", "peak MiB", "times faster"):
        table.add_column(name, justify="right")
    for row in rows:
        table.add_row(
            row.op,
            row.shape,
            row.dtype,
            row.impl,
            row.baseline,
            f"{row.median_s * 1e3:.2f}",
            f"{row.p10_s * 1e3:.2f}",
            f"{row.peak_bytes / 2**20:.1f}",
            f"{row.ratio:.2f}",
        )
    return table


def publish(rows: Sequence[Row], argv: Sequence[str] | None = None) -> None:
    """Print the table and, with `--json FILE`, write the rows."""
    path = parse_arguments(argv).json
    Console(width=None if Console().is_terminal else 120).print(make_table(rows))
    if path is not None:
        write_json(rows, path)


def parse_arguments(argv: Sequence[str] | None = None) -> argparse.Namespace:
    """The arguments every benchmark program has: `--json FILE` and `--runs N`."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the rows here too")
    parser.add_argument("--runs", type=int, default=11, metavar="N", help="timed runs of each (default 11)")
    return parser.parse_args(argv)
