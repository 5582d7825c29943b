"""Benchmark results as rows: a JSON line each, with the machine it was measured on, and a table."""

from __future__ import annotations

import argparse
import json
import os
import platform
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from rich.console import Console
from rich.table import Table

from findrec import __version__

UNIT = "1,000 targets"  # what a row's seconds are for; ends the name of its op


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


def write_json_lines(rows: Iterable[Row | Mapping[str, object]], path: Path) -> None:
    """One JSON object a line, each with the `machine` it was measured on."""
    here = machine()
    lines = [{**(asdict(row) if isinstance(row, Row) else row), "machine": here} for row in rows]
    path.write_text("".join(f"{json.dumps(line)}\n" for line in lines), encoding="utf-8")


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


def make_rate_table(rows: Iterable[Row]) -> Table:
    """The same for steps and trainings: rows of 1,000 targets as targets a second, others in seconds."""
    table = Table(title="medians; times faster than the baseline")
    for name in ("op", "shape", "impl", "baseline"):
        table.add_column(name)
    for name in ("median", "peak MiB", "times faster"):
        table.add_column(name, justify="right")
    for row in rows:
        rated = row.op.endswith(UNIT)
        median = f"{1000 / row.median_s:,.0f} targets/s" if rated else f"{row.median_s:,.1f} s"
        op = row.op.removesuffix(f", {UNIT}")
        peak = f"{row.peak_bytes / 2**20:,.0f}"
        table.add_row(op, row.shape, row.impl, row.baseline, median, peak, f"{row.ratio:.2f}")
    return table


def publish(
    rows: Sequence[Row], path: Path | None, table: Callable[[Iterable[Row]], Table] = make_table
) -> None:
    """Print the rows as a table and, where a file is given, write them."""
    Console(width=None if Console().is_terminal else 140).print(table(rows))
    if path is not None:
        write_json_lines(rows, path)


def add_json_argument(parser: argparse.ArgumentParser) -> None:
    """`--json FILE`, refused before anything is measured where it could not be written after."""
    parser.add_argument("--json", type=_file, metavar="FILE", help="write JSON lines here too")


def _file(name: str) -> Path:
    path = Path(name)
    if path.is_dir() or not path.absolute().parent.is_dir():
        raise argparse.ArgumentTypeError(f"{name} cannot be written: give a file in a folder that exists")
    return path
