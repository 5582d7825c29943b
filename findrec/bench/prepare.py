"""How fast a raw log becomes a data folder and an epoch is planned, and the memory of the whole process tree.

The preparing runs in a process of its own, as `findrec prepare` would; its memory and that of what it starts
are sampled twenty times a second, and the kernel's own high-water mark of the process counts too.
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

from findrec.bench.memory import peak_rss_bytes, tree_rss_bytes
from findrec.datasets.engine import Limits, Stopwatch
from findrec.datasets.plan import cut_windows, plan_epoch
from findrec.datasets.prepare import prepare
from findrec.datasets.profile import load_profile
from findrec.datasets.recipe import parse_recipe
from findrec.datasets.synthesize import write_log
from findrec.errors import FindRecError

SAMPLE_S = 0.05
Figures = dict[str, Any]


@dataclass(frozen=True)
class PrepareBench:
    """What is measured: about `events` events of a profile, or a log that is there, and the recipe's keys."""

    events: int
    profile: str
    items: int | None
    log: Path | None
    recipe: dict[str, Any]
    folder: Path | None  # where data are put; a throw-away folder by default
    limits: Limits


def bench_prepare(given: PrepareBench) -> Figures:
    """Make the log (unless given), prepare it, and return a row of figures; times are in seconds."""
    with tempfile.TemporaryDirectory(dir=given.folder) as scratch:
        folder, made_s, log = Path(scratch), 0.0, given.log
        if log is None:
            begin = time.perf_counter()
            log = folder / "log.parquet"
            profile = load_profile(given.profile)
            mean_length = math.exp(profile.lengths.mu + profile.lengths.sigma**2 / 2)
            write_log(log, profile, users=max(1, round(given.events / mean_length)), items=given.items)
            made_s = time.perf_counter() - begin
        found, peak = _in_child(log.absolute(), folder, given)
        return {
            "op": "prepare",
            "profile": given.profile if given.log is None else log.name,
            **{key: found[key] for key in ("users", "items", "events")},
            "events_per_s": round(found["events"] / sum(found["seconds"].values())),
            "peak_bytes": peak,
            "seconds": {name: round(seconds, 2) for name, seconds in found["seconds"].items()},
            "synthesize_s": round(made_s, 2),
            "log_bytes": log.stat().st_size,
            "folder_bytes": found["folder_bytes"],
            "events_sha256": found["events_sha256"],
            "memory_gib": given.limits.memory_gib,
            "threads": given.limits.threads,
            "recipe": given.recipe,
        }


def _in_child(log: Path, folder: Path, given: PrepareBench) -> tuple[Figures, int]:
    """What `_prepare` sends, and the largest resident set of it and its children together."""
    context = multiprocessing.get_context("spawn")
    ours, theirs = context.Pipe(duplex=False)
    process = context.Process(
        target=_prepare, args=(theirs, log, folder / "data", given.recipe, given.limits)
    )
    process.start()
    theirs.close()
    peak = 0
    while not ours.poll(SAMPLE_S):
        peak = max(peak, tree_rss_bytes(process.pid or 0))
    try:
        found: Figures = ours.recv()
    except EOFError:
        found = {"error": "the process was killed (out of memory?)"}
    process.join()
    if "error" in found:
        raise FindRecError(f"preparing {log} failed: {found['error']}")
    return found, max(peak, int(found["peak_bytes"]))


def _prepare(pipe: Connection, log: Path, target: Path, extras: Figures, limits: Limits) -> None:
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
        **extras,
    }
    watch = Stopwatch()
    try:
        made = prepare(parse_recipe(tree, "bench", target.parent), target, limits=limits, watch=watch)
    except Exception as error:
        pipe.send({"error": f"{type(error).__name__}: {error}"})
        return
    manifest = made.manifest
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
    """As much of a data folder as cutting windows needs: histories of geometric length."""

    def __init__(self, users: int, mean: float) -> None:
        self.valid_start = np.random.default_rng(0).geometric(1 / mean, users).astype(np.int64)


def bench_plan(
    users: int, *, mean: float = 10.0, max_length: int = 200, tokens: int = 8192, microbatches: int = 12
) -> Figures:
    """A row of planning one epoch over users with `mean` training events each; times are in seconds."""
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
        "cut_s": round(cut_s, 3),
        "plan_s": round(time.perf_counter() - begin, 3),
        "padding": plan.padding,
        "digest": plan.digest,
    }
