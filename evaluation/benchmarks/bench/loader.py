"""Benchmark of reading packed shards into training batches on one core, against the WebDataset pipeline.

`findrec` is an `ExampleLoader` with its thread and queue, over a planned epoch at the default token budget.
`webdataset` reads one user per tar member (an `.npy` of items and times) through the library's own pipeline
and decoder in file order, and pads as many users per batch into the same `Batch` with numpy and torch;
`webdataset, our batches` pads them with our compiled code. Files are in the page cache and runs alternate;
planning is not included.

`users` and `events` are those trained on, each counted once (the last two events of a user are held out);
`bytes` are 12 per event, as stored in a shard (4 for the item, 8 for the time).
"""

from __future__ import annotations

import itertools
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

from findrec.config import RunConfig
from findrec.datasets.batches.batch import Batch
from findrec.datasets.batches.examples import ExampleLoader
from findrec.datasets.batches.padding import padded_batch
from findrec.datasets.batches.plan import cut_windows
from findrec.datasets.batches.windows import WindowExamples
from findrec.datasets.folder._native import Impl
from findrec.datasets.folder.data_folder import DataFolder
from findrec.datasets.folder.histories import Histories
from findrec.datasets.folder.splits import Int64Array, Split
from findrec.datasets.folder.writer import USERS_PER_MEMBER, Block, FolderInput, write_folder
from findrec.timer import time_alternating
from findrec.training.allocator import keep_freed_memory

HELD_OUT = 2  # events per user that are not trained on: the default split
EVENT_BYTES = 12
STOCK = "webdataset"
Figures = dict[str, Any]


@dataclass(frozen=True)
class Profile:
    """Synthetic users with about `mean` training events each, over `items` items drawn from a Zipf law.

    Lengths are geometric, or lognormal with sigma `spread`, and at most `longest`.
    """

    name: str
    users: int
    mean: float
    items: int
    longest: int
    max_length: int  # inputs of a window: from `longest` on, every user is one row
    stock_users: int  # number of users read through the WebDataset pipeline
    spread: float = 0.0

    def lengths(self) -> Int64Array:
        """Number `[U]` of training events of each user, at least 2."""
        rng = np.random.default_rng(0)
        if self.spread:
            mu = np.log(self.mean) - self.spread**2 / 2
            drawn = rng.lognormal(mu, self.spread, self.users).astype(np.int64)
        else:
            drawn = 1 + rng.geometric(1 / (self.mean - 1), self.users)
        return np.clip(drawn, 2, self.longest)

    def blocks(self) -> Iterator[Block]:
        """Yield the users' events in blocks of one shard member."""
        rng = np.random.default_rng(1)
        length = self.lengths() + HELD_OUT
        for begin in range(0, self.users, USERS_PER_MEMBER):
            some = length[begin : begin + USERS_PER_MEMBER]
            count = int(some.sum())
            item = np.exp(rng.random(count) * np.log(self.items)).astype(np.int64)  # the k-th with ~ 1 / k
            gap = rng.integers(1, 100_000, count) * (rng.random(count) < 0.9)  # one in ten is simultaneous
            yield Block({"item": item, "timestamp": 1_600_000_000 + np.cumsum(gap)}, some)


# "windows" are the long histories as the default configuration cuts them, with half of each window as
# context: every event is read about twice.
PROFILES = (
    Profile("short", 500_000, 10, 50_000, 200, 200, 20_000),
    Profile("long", 10_000, 800, 50_000, 3000, 3000, 2_000, 0.6),
    Profile("long, windows", 10_000, 800, 50_000, 3000, 200, 2_000, 0.6),
)


def write_profile(profile: Profile, path: Path) -> DataFolder:
    """Write the profile as a data folder."""
    names = pa.array([str(v) for v in range(1, profile.items + 1)])
    empty = pa.array([None] * profile.items, pa.string())
    content = FolderInput(
        recipe=profile.name,
        recipe_sha256="",
        split=Split(),
        users=pa.array([str(u) for u in range(profile.users)]),
        items=pa.table({"raw": names, "title": names, "text": empty, "category": empty}),
        blocks=profile.blocks(),
    )
    write_folder(path, content)
    return DataFolder.open(path)


def write_stock(folder: DataFolder, users: int, path: Path) -> None:
    """Write the training events of the first users with WebDataset's writer, one user per member."""
    rows = np.arange(users)
    read = folder.histories(rows, stop=folder.valid_start[rows])
    with webdataset.TarWriter(str(path)) as tar:
        for row, (a, b) in enumerate(itertools.pairwise(read.offset)):
            tar.write({"__key__": f"{row:09d}", "npy": np.stack([read.item[a:b], read.timestamp[a:b]])})


class Counted:
    """A run to be timed, which counts the targets of its batches."""

    def __init__(self, batches: Callable[[], Iterable[Batch]]) -> None:
        self._batches = batches
        self.targets = 0

    def __call__(self) -> None:
        """Read one epoch and count its targets."""
        self.targets = sum(len(batch.target) for batch in self._batches())


def ours(folder: DataFolder, profile: Profile) -> Callable[[], Iterator[Batch]]:
    """Return a function that reads an epoch's batches through the trainer's loader."""
    config = RunConfig()
    source = WindowExamples(config, folder, cut_windows(folder, profile.max_length, config.data.overlap))
    plan = source.plan(0)

    def batches() -> Iterator[Batch]:
        with ExampleLoader(source, plan, rank=0, world=1) as loader:
            for _, step in loader:
                for _, batch in step:
                    yield batch

    return batches


def stock(shard: Path, profile: Profile, impl: Impl) -> Callable[[], Iterable[Batch]]:
    """Return a function that reads a one-user-per-member tar through the WebDataset pipeline."""
    batch_size = max(1, int(RunConfig().training.num_tokens / profile.mean))

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
        read: Iterable[Batch] = source.to_tuple("__key__", "npy").batched(batch_size, collation_fn=collate)
        return read

    return batches


def bench_loader(profiles: Sequence[Profile] = PROFILES, *, runs: int = 5) -> list[Figures]:
    """Measure three rows per profile, with the process pinned to one core."""
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
