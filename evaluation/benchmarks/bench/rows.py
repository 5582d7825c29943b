"""Benchmark results as rows: JSON lines with the machine they were measured on, and tables."""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from rich.console import Console
from rich.table import Table

from findrec.environment import machine

UNIT = "1,000 targets"  # rows whose op ends with it have seconds per 1,000 targets


@dataclass(frozen=True)
class Row:
    """One implementation at one shape; `ratio` is the baseline's median over ours (> 1: ours is faster)."""

    op: str
    shape: str
    dtype: str
    impl: str
    baseline: str
    median_s: float
    p10_s: float
    peak_bytes: int
    ratio: float


def write_json_lines(rows: Iterable[Row | Mapping[str, object]], path: Path) -> None:
    """Write one JSON object per line, each with the `machine` it was measured on."""
    host = machine()
    lines = [{**(asdict(row) if isinstance(row, Row) else row), "machine": host} for row in rows]
    path.write_text("".join(f"{json.dumps(line)}\n" for line in lines), encoding="utf-8")


def publish_figures(rows: Sequence[Mapping[str, object]], path: Path | None) -> None:
    """Print one JSON object per line and, if a file is given, write them."""
    for row in rows:
        print(json.dumps(row))
    if path is not None:
        write_json_lines(rows, path)


def make_table(rows: Iterable[Row]) -> Table:
    """A table of milliseconds, MiB and speed-up over the baseline."""
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
    """A table for steps and trainings, in targets per second or in seconds."""
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
    """Print the rows as a table and, if a file is given, write them."""
    Console(width=None if Console().is_terminal else 140).print(table(rows))
    if path is not None:
        write_json_lines(rows, path)


def make_parser(description: str | None) -> argparse.ArgumentParser:
    """A parser with `--json FILE`, which is checked before anything is measured."""
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--json", type=_file, metavar="FILE", help="also write JSON lines to this file")
    return parser


def _file(name: str) -> Path:
    path = Path(name)
    if path.is_dir() or not path.absolute().parent.is_dir():
        raise argparse.ArgumentTypeError(f"{name} cannot be written: give a file in an existing folder")
    return path
