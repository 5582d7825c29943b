"""Benchmark of preparing a data folder from a raw log, and of planning an epoch: time and memory.

Preparation runs in a separate process, as `findrec prepare` does. Its peak memory is the larger of the
resident set of its process tree, sampled 20 times per second, and the kernel's high-water mark.
"""

from __future__ import annotations

import math
import multiprocessing
import tempfile
import time
from dataclasses import dataclass
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import numpy as np
from bench.memory import peak_rss_bytes, tree_rss_bytes

from findrec.datasets.batches.plan import cut_windows, plan_epoch
from findrec.datasets.prepare.pipeline import prepare
from findrec.datasets.sources.duckdb_engine import Limits, Stopwatch
from findrec.datasets.sources.recipe import parse_recipe
from findrec.datasets.synthetic.profile import load_profile
from findrec.datasets.synthetic.synthesize import write_log
from findrec.errors import FindRecError

SAMPLE_S = 0.05
Figures = dict[str, Any]


@dataclass(frozen=True)
class PrepareBench:
    """Parameters of the benchmark."""

    events: int  # approximate number of synthetic events
    profile: str
    items: int | None
    log: Path | None  # an existing log to use instead
    recipe: dict[str, Any]  # additional keys of the recipe
    folder: Path | None  # working folder; default: a temporary one
    limits: Limits


def bench_prepare(bench: PrepareBench) -> Figures:
    """Synthesise the log unless given, prepare it, and return a row of figures with times in seconds."""
    with tempfile.TemporaryDirectory(dir=bench.folder) as scratch:
        folder, synthesize_s, log = Path(scratch), 0.0, bench.log
        if log is None:
            begin = time.perf_counter()
            log = folder / "log.parquet"
            profile = load_profile(bench.profile)
            mean_length = math.exp(profile.lengths.mu + profile.lengths.sigma**2 / 2)
            write_log(log, profile, users=max(1, round(bench.events / mean_length)), items=bench.items)
            synthesize_s = time.perf_counter() - begin
        figures, peak = _in_child(log.absolute(), folder, bench)
        return {
            "op": "prepare",
            "profile": bench.profile if bench.log is None else log.name,
            **{key: figures[key] for key in ("users", "items", "events")},
            "events_per_s": round(figures["events"] / sum(figures["seconds"].values())),
            "peak_bytes": peak,
            "seconds": {name: round(seconds, 2) for name, seconds in figures["seconds"].items()},
            "synthesize_s": round(synthesize_s, 2),
            "log_bytes": log.stat().st_size,
            "folder_bytes": figures["folder_bytes"],
            "events_sha256": figures["events_sha256"],
            "memory_gib": bench.limits.memory_gib,
            "threads": bench.limits.threads,
            "recipe": bench.recipe,
        }


def _in_child(log: Path, folder: Path, bench: PrepareBench) -> tuple[Figures, int]:
    """Run `_prepare` in a process; returns what it sends and the peak memory of its process tree."""
    context = multiprocessing.get_context("spawn")
    ours, theirs = context.Pipe(duplex=False)
    process = context.Process(
        target=_prepare, args=(theirs, log, folder / "data", bench.recipe, bench.limits)
    )
    process.start()
    theirs.close()
    peak = 0
    while not ours.poll(SAMPLE_S):
        peak = max(peak, tree_rss_bytes(process.pid or 0))
    try:
        figures: Figures = ours.recv()
    except EOFError:
        figures = {"error": "the process was killed (out of memory?)"}
    process.join()
    if "error" in figures:
        raise FindRecError(f"preparing {log} failed: {figures['error']}")
    return figures, max(peak, int(figures["peak_bytes"]))


def _prepare(pipe: Connection, log: Path, target: Path, recipe: Figures, limits: Limits) -> None:
    kind = log.suffixes[0].removeprefix(".")
    tree = {
        "name": "log",
        "title": log.name,
        "licence": "none",
        "source": "made up",
        "sources": {
            "log": [{"path": str(log.parent), "files": {"log": {"member": log.name, "format": kind}}}]
        },
        "events": 'SELECT "user", item, timestamp FROM {log}',
        **recipe,
    }
    watch = Stopwatch()
    try:
        folder = prepare(parse_recipe(tree, "bench", target.parent), target, limits=limits, stopwatch=watch)
    except Exception as error:
        pipe.send({"error": f"{type(error).__name__}: {error}"})
        return
    manifest = folder.manifest
    pipe.send(
        {
            "users": manifest.num_users,
            "items": manifest.num_items,
            "events": manifest.num_events,
            "events_sha256": manifest.events_sha256,
            "folder_bytes": sum(path.stat().st_size for path in target.rglob("*") if path.is_file()),
            "seconds": watch.seconds,
            "peak_bytes": peak_rss_bytes(),
        }
    )


class _Users:
    """The part of a data folder that `cut_windows` needs: histories of geometric length."""

    def __init__(self, users: int, mean: float) -> None:
        self.valid_start = np.random.default_rng(0).geometric(1 / mean, users).astype(np.int64)


def bench_plan(
    users: int, *, mean: float = 10.0, max_length: int = 200, tokens: int = 8192, microbatches: int = 12
) -> Figures:
    """Measure planning one epoch over users with `mean` training events each; times are in seconds."""
    folder: Any = _Users(users, mean)
    begin = time.perf_counter()
    windows = cut_windows(folder, max_length, 0.5)
    cut_s = time.perf_counter() - begin
    begin = time.perf_counter()
    plan = plan_epoch(windows, seed=0, epoch=0, microbatches=microbatches, tokens=tokens)
    return {
        "op": "plan",
        "users": users,
        "events": int(folder.valid_start.sum()),
        "windows": len(windows),
        "steps": len(plan.steps),
        "tokens": tokens,
        "microbatches": microbatches,
        "cut_s": round(cut_s, 6),
        "plan_s": round(time.perf_counter() - begin, 6),
        "padding": plan.padding,
        "digest": plan.digest,
    }
