"""Benchmark of drawing synthetic data, writing it as a data folder and computing its statistics.

Each profile runs in a separate process to measure its peak memory.
"""

from __future__ import annotations

import math
import multiprocessing
import resource
import tempfile
import time
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from findrec.datasets.stats.statistics import measure
from findrec.datasets.synthetic.profile import load_profile
from findrec.datasets.synthetic.synthesize import Synthesis, synthesize

PROFILES = ("complete-journey", "ml-latest-small", "amazon-grocery")
Figures = dict[str, Any]


def _measured(name: str, events: int, items: int | None, seed: int) -> Figures:
    profile = load_profile(name)
    mean_length = math.exp(profile.lengths.mu + profile.lengths.sigma**2 / 2)
    users = max(1, round(events / mean_length))
    begin = time.perf_counter()
    made = Synthesis(profile, users, items, seed)
    drawn = sum(len(block.columns["item"]) for block in made.blocks())
    draw_s = time.perf_counter() - begin
    with tempfile.TemporaryDirectory() as scratch:
        begin = time.perf_counter()
        folder = synthesize(Path(scratch) / "data", profile, users=users, items=items, seed=seed)
        write_s = time.perf_counter() - begin
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss << 10  # Linux counts KiB
        begin = time.perf_counter()
        measure(folder)
        measure_s = time.perf_counter() - begin
    return {
        "profile": name,
        "users": users,
        "items": made.items,
        "events": drawn,
        "draw_events_per_s": drawn / draw_s,
        "write_events_per_s": drawn / write_s,
        "measure_events_per_s": drawn / measure_s,
        "peak_bytes": peak,
    }


def bench_synthesize(events: int, items: int | None, seed: int) -> list[Figures]:
    """Measure one row per profile, of about `events` events over `items` items; `write` includes drawing."""
    context = multiprocessing.get_context("spawn")
    rows = []
    for name in PROFILES:
        with context.Pool(1) as pool:
            rows.append(pool.apply(_measured, (name, events, items, seed)))
    return rows


def print_figures(rows: list[Figures]) -> None:
    """Print a table of thousands of events per second and peak memory in MiB."""
    table = Table(
        "profile", "users", "items", "events", "draw k/s", "draw + write k/s", "stats k/s", "peak MiB"
    )
    for row in rows:
        rates = [f"{row[f'{kind}_events_per_s'] / 1000:,.0f}" for kind in ("draw", "write", "measure")]
        sizes = [f"{row[key]:,}" for key in ("users", "items", "events")]
        table.add_row(row["profile"], *sizes, *rates, f"{row['peak_bytes'] / 2**20:,.0f}")
    console = Console()
    console.print(table, width=max(console.width, 110), soft_wrap=True)
