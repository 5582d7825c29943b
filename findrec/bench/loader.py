"""How fast one core turns packed shards into the trainer's batches, beside the stock WebDataset pipeline.

A ready batch is the whole `Batch` that the trainer takes: right-padded items, their gap buckets and the place
of each among the distinct items, all int64 `[B, L]`; lengths, users, and the sorted distinct ids; flat
positions, targets and waiting times of everything that is asked for. `findrec` is a `TrainLoader`, thread and
queue and all, over a planned epoch at the default token budget, with events of one instant shuffled.
`webdataset` reads users one to a tar member (an `.npy` of its items and times) through the library's own
pipeline and decoder, in the order of the file, and pads as many at a time into the same tensors with numpy
and torch, as one would; `webdataset, our batches` pads them with our compiled code. All on one core, files in
the page cache, runs in turn; planning is not part of it.

`users` and `events` are those trained on, each counted once (the last two events of a user are held out), and
`bytes` are 12 for each event: what a shard stores of it (4 for the item, 8 for the time).
"""

from __future__ import annotations

import itertools
import json
import os
import tempfile
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import torch
import webdataset

from findrec.bench.timer import time_alternating
from findrec.config import RunConfig
from findrec.datasets._native import Impl
from findrec.datasets.batch import Batch
from findrec.datasets.batches import TrainLoader
from findrec.datasets.folder import DataFolder
from findrec.datasets.histories import Histories
from findrec.datasets.padding import padded_batch
from findrec.datasets.plan import cut_windows, plan_epoch
from findrec.datasets.splits import Int64Array, Split
from findrec.datasets.writer import USERS_PER_MEMBER, Block, FolderInput, write_folder
from findrec.training.allocator import keep_freed_memory

HELD_OUT = 2  # events of a user that are not trained on: the default split
EVENT_BYTES = 12
STOCK = "webdataset"
Figures = dict[str, Any]


@dataclass(frozen=True)
class Profile:
    """Made-up users with about `mean` training events each, over `items` items drawn from a Zipf law.

    Lengths are geometric, or lognormal with sigma `spread`, and at most `longest`.
    """

    name: str
    users: int
    mean: float
    items: int
    longest: int
    max_length: int  # inputs of a window: `longest` and more makes every user one row
    stock_users: int  # as many are read through the stock pipeline
    spread: float = 0.0

    def lengths(self) -> Int64Array:
        """`[U]` training events of each user, at least 2."""
        rng = np.random.default_rng(0)
        if self.spread:
            mu = np.log(self.mean) - self.spread**2 / 2
            drawn = rng.lognormal(mu, self.spread, self.users).astype(np.int64)
        else:
            drawn = 1 + rng.geometric(1 / (self.mean - 1), self.users)
        return np.clip(drawn, 2, self.longest)

    def blocks(self) -> Iterator[Block]:
        """The users' events, as many users at a time as a member holds."""
        rng = np.random.default_rng(1)
        length = self.lengths() + HELD_OUT
        for begin in range(0, self.users, USERS_PER_MEMBER):
            some = length[begin : begin + USERS_PER_MEMBER]
            count = int(some.sum())
            item = np.exp(rng.random(count) * np.log(self.items)).astype(np.int64)  # the k-th with ~ 1 / k
            gap = rng.integers(1, 100_000, count) * (rng.random(count) < 0.9)  # one in ten shares its instant
            yield Block({"item": item, "timestamp": 1_600_000_000 + np.cumsum(gap)}, some)


# "windows" are the long histories as the default configuration cuts them, with half of each window as
# context: every event is read about twice.
PROFILES = (
    Profile("short", 500_000, 10, 50_000, 200, 200, 20_000),
    Profile("long", 10_000, 800, 50_000, 3000, 3000, 2_000, 0.6),
    Profile("long, windows", 10_000, 800, 50_000, 3000, 200, 2_000, 0.6),
)


def write_profile(profile: Profile, path: Path) -> DataFolder:
    """The profile as a data folder."""
    names = pa.array([str(v) for v in range(1, profile.items + 1)])
    nothing = pa.array([None] * profile.items, pa.string())
    given = FolderInput(
        recipe=profile.name,
        recipe_sha256="",
        split=Split(),
        users=pa.array([str(u) for u in range(profile.users)]),
        items=pa.table({"raw": names, "title": names, "text": nothing, "category": nothing}),
        blocks=profile.blocks(),
    )
    write_folder(path, given)
    return DataFolder.open(path)


def write_stock(folder: DataFolder, users: int, path: Path) -> None:
    """The training events of the first users, one user to a member, as the library's own writer does it."""
    rows = np.arange(users)
    read = folder.histories(rows, stop=folder.valid_start[rows])
    with webdataset.TarWriter(str(path)) as tar:
        for row, (a, b) in enumerate(itertools.pairwise(read.offset)):
            tar.write({"__key__": f"{row:09d}", "npy": np.stack([read.item[a:b], read.timestamp[a:b]])})


class Counted:
    """A run that is timed: `made` says what it went through."""

    def __init__(self, batches: Callable[[], Iterable[Batch]]) -> None:
        self._batches = batches
        self.targets = 0

    def __call__(self) -> None:
        self.targets = sum(len(batch.target) for batch in self._batches())


def ours(folder: DataFolder, profile: Profile) -> Callable[[], Iterator[Batch]]:
    """A function that reads an epoch's batches through the trainer's loader."""
    training = RunConfig().training
    windows = cut_windows(folder, profile.max_length, RunConfig().data.overlap)
    plan = plan_epoch(windows, seed=0, epoch=0, microbatches=training.microbatches, tokens=training.tokens)

    def batches() -> Iterator[Batch]:
        with TrainLoader(folder, windows, plan, rank=0, world=1, tie_seed=1) as loader:
            for _, step in loader:
                for _, batch in step:
                    yield batch

    return batches


def stock(shard: Path, profile: Profile, impl: Impl) -> Callable[[], Iterable[Batch]]:
    """A function that reads as many users of a one-user-per-member tar through the library's pipeline."""
    together = max(1, int(RunConfig().training.tokens / profile.mean))

    def collate(samples: list[tuple[str, Any]]) -> Batch:
        both = np.concatenate([values for _, values in samples], axis=1)
        offset = np.concatenate([[0], np.cumsum([values.shape[1] for _, values in samples])])
        users = np.array([int(key) for key, _ in samples])
        histories = Histories(both[0], both[1], offset)
        return padded_batch(
            histories, users, profile.items, skip=np.zeros(len(users), dtype=np.int64), impl=impl
        )

    def batches() -> Iterable[Batch]:
        source = webdataset.WebDataset(str(shard), shardshuffle=False).decode()
        read: Iterable[Batch] = source.to_tuple("__key__", "npy").batched(together, collation_fn=collate)
        return read

    return batches


def bench_loader(profiles: Sequence[Profile] = PROFILES, *, runs: int = 5) -> list[Figures]:
    """Three rows for each profile. Keeps the process on one core while it measures."""
    cores, threads = os.sched_getaffinity(0), torch.get_num_threads()
    os.sched_setaffinity(0, {min(cores)})
    keep_freed_memory()  # as workers do
    torch.set_num_threads(1)
    try:
        return [row for profile in profiles for row in _measured(profile, runs)]
    finally:
        os.sched_setaffinity(0, cores)
        torch.set_num_threads(threads)


def _measured(profile: Profile, runs: int) -> list[Figures]:
    with tempfile.TemporaryDirectory(prefix="findrec-") as scratch:
        folder = write_profile(profile, Path(scratch) / "data")
        shard = Path(scratch) / "stock.tar"
        write_stock(folder, profile.stock_users, shard)
        timed = {
            "findrec": Counted(ours(folder, profile)),
            STOCK: Counted(stock(shard, profile, "reference")),
            f"{STOCK}, our batches": Counted(stock(shard, profile, "auto")),
        }
        users = {impl: profile.users if impl == "findrec" else profile.stock_users for impl in timed}
        timings = time_alternating(timed, runs=runs)
        rows = []
        for impl, timing in timings.items():
            events = int(folder.valid_start[: users[impl]].sum())
            assert timed[impl].targets == events - users[impl], "every event but a user's first is a target"
            rows.append(
                {
                    "impl": impl,
                    "profile": profile.name,
                    "users": users[impl],
                    "events": events,
                    "users_per_s": users[impl] / timing.median_s,
                    "events_per_s": events / timing.median_s,
                    "bytes_per_s": EVENT_BYTES * events / timing.median_s,
                    "times_stock": timings[STOCK].median_s / users[STOCK] * users[impl] / timing.median_s,
                }
            )
        return rows


def print_figures(rows: Sequence[Figures]) -> None:
    """Print one JSON object a line."""
    for row in rows:
        print(json.dumps(row))
