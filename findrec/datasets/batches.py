"""From planned windows and evaluated users to right-padded batches, and the loader that runs ahead."""

from __future__ import annotations

import itertools
import queue
import threading
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor

from findrec.datasets.batch import Batch
from findrec.datasets.folder import DataFolder
from findrec.datasets.histories import Histories
from findrec.datasets.padding import gap_buckets, padded_batch
from findrec.datasets.plan import EpochPlan, Windows, share
from findrec.datasets.splits import Int64Array, unit_starts

PREFETCHED_STEPS = 2

Part = Literal["valid", "test"]
Step = tuple[int, list[tuple[int, Batch]]]


@dataclass(frozen=True)
class Cases:
    """Evaluated targets: case c asks for `target[c]` after row `row[c]` of its batch. All `[C]` int64."""

    row: Tensor
    user: Tensor  # row of the user in the data folder
    target: Tensor
    time: Tensor  # of the target's event, in seconds


def train_batch(
    folder: DataFolder, windows: Windows, chosen: Int64Array, *, tie_seed: int | None = None
) -> Batch:
    """The batch of the windows `chosen`: every event of `[first_target, stop)` is asked for once, at the
    position of the event before it. With `tie_seed`, events of one timestamp are shuffled by it.
    """
    return train_batches(folder, windows, [chosen], tie_seed=tie_seed)[0]


def train_batches(
    folder: DataFolder, windows: Windows, parts: Sequence[Int64Array], *, tie_seed: int | None = None
) -> list[Batch]:
    """The batch of each of `parts`, all read at once; see `train_batch`."""
    chosen = np.concatenate(parts)
    user, start, stop = windows.user[chosen], windows.start[chosen], windows.stop[chosen]
    shown = folder.histories(user, start, stop, tie_seed=tie_seed)  # and, last, what is only asked for
    skip = windows.first_target[chosen] - 1 - start
    batches, begin = [], 0
    for end in itertools.accumulate(len(part) for part in parts):
        rows = slice(begin, end)
        some = shown.rows(begin, end)
        batches.append(padded_batch(some, user[rows], folder.num_items, skip=skip[rows]))
        begin = end
    return batches


def _cuts(folder: DataFolder, split: Part) -> tuple[Int64Array, Int64Array]:
    """First and one past the last target event of every user."""
    if split == "valid":
        return folder.valid_start, folder.test_start
    if split == "test":
        return folder.test_start, folder.length
    raise ValueError(f"split must be 'valid' or 'test', not {split!r}")


@dataclass(frozen=True)
class Moments:
    """When targets are asked for: row b asks its user for the events `[first, last)` after those before
    `first`. All `[B]` int64, the rows of a user one after the other, in time.
    """

    user: Int64Array  # rows of the data folder
    first: Int64Array
    last: Int64Array


def asks_one_by_one(folder: DataFolder) -> bool:
    """Whether every unit of a part has a history of its own (a `tail` split)."""
    return folder.manifest.split.get("kind") == "tail"


def moments(folder: DataFolder, split: Part, users: Int64Array) -> Moments:
    """One row for each of `users`, which asks for all of its targets; in a `tail` split one for each event,
    or for each basket where baskets are the unit.
    """
    first, last = (cut[users] for cut in _cuts(folder, split))
    if not asks_one_by_one(folder):
        return Moments(users, first, last)
    targets = folder.histories(users, first, last)
    begins = unit_starts(targets.timestamp, targets.offset, str(folder.manifest.split.get("unit", "event")))
    at = np.flatnonzero(begins)
    row = np.searchsorted(targets.offset, at, side="right") - 1
    begin = first[row] + at - targets.offset[row]
    end = begin + np.diff(np.append(at, len(begins)))
    return Moments(users[row], begin, end)


def evaluated_users(folder: DataFolder, split: Part) -> Int64Array:
    """User rows with a target in the split and at least one event before it, ascending.

    In a global_temporal split a user may have come after its first cut: nothing of such a user was learnt,
    but what happened before the second cut is a history to recommend from. Who came after that has none.
    """
    first, last = _cuts(folder, split)
    return np.flatnonzero((last > first) & (first > 0))


def evaluation_blocks(
    folder: DataFolder, split: Part, users_per_block: int, sample: int | None = None
) -> list[Int64Array]:
    """The `evaluated_users`, by length of history, in blocks.

    The blocks are the same for any number of workers; rank r of W takes blocks r, r + W, ... Where users are
    asked several times (`moments`) a block holds fewer of them, so that it has no more rows. With `sample`
    so many of the users, drawn by the data alone: the same ones in every run.
    """
    first, last = _cuts(folder, split)
    if asks_one_by_one(folder):
        most = int((last - first).max(initial=1))
        users_per_block = max(1, users_per_block // max(1, most))
    users = evaluated_users(folder, split)
    if sample is not None and sample < len(users):
        users = np.sort(np.random.default_rng(0).choice(users, sample, replace=False))
    users = users[np.argsort(first[users], kind="stable")]
    return [users[begin : begin + users_per_block] for begin in range(0, len(users), users_per_block)]


def evaluation_batch(
    folder: DataFolder, split: Part, users: Int64Array, max_length: int
) -> tuple[Batch, Cases]:
    """The last `max_length` events before each of the users' `moments`, and the targets asked for there.

    `position` is the last valid place of each row and `target` is empty: a row's one vector ranks all of its
    targets, which are several where a basket, a share or a period of time is asked for.
    """
    asked = moments(folder, split, users)
    users = asked.user
    targets = folder.histories(users, asked.first, asked.last)
    batch = asking_batch(folder, users, asked.first, targets.timestamp[targets.offset[:-1]], max_length)
    row = np.repeat(np.arange(len(users)), np.diff(targets.offset))
    return batch, Cases(
        row=torch.from_numpy(row),
        user=torch.from_numpy(users[row].astype(np.int64)),
        target=torch.from_numpy(targets.item),
        time=torch.from_numpy(targets.timestamp),
    )


def asking_batch(
    folder: DataFolder, users: Int64Array, stop: Int64Array, time: Int64Array, max_length: int
) -> Batch:
    """The last `max_length` of the first `stop` `[B]` (at least 1) events of `users` `[B]`, who are asked at
    `time` `[B]` (s) what comes next: `position` is the last valid place of each row, `target` is empty.
    """
    start = np.maximum(stop - max_length, 0)
    shown = padded_batch(folder.histories(users, start, stop), users, folder.num_items)
    last = folder.histories(users, stop - 1, stop).timestamp
    turn = np.stack([last, time], axis=1)  # the last event shown and the moment of asking
    return replace(
        shown,
        position=torch.arange(len(users)) * shown.item.shape[1] + shown.length - 1,
        wait=torch.from_numpy(gap_buckets(turn.reshape(-1), 2 * np.arange(len(users) + 1))[1::2]),
    )


def target_events(folder: DataFolder, split: Part, users: Int64Array) -> Histories:
    """The events of `users` that are the split's targets."""
    first, last = _cuts(folder, split)
    return folder.histories(users, first[users], last[users])


class TrainLoader:
    """Iterates `(step, [(microbatch, Batch), ...])` of one rank, built by a thread that runs ahead.

    `first_step` resumes inside an epoch. Use it as a context manager, or call `close`, where the iteration
    may end early. An exception of the thread is raised in the caller.
    """

    def __init__(
        self,
        folder: DataFolder,
        windows: Windows,
        plan: EpochPlan,
        *,
        rank: int,
        world: int,
        first_step: int = 0,
        tie_seed: int | None = None,
    ) -> None:
        self._tie_seed = tie_seed
        self._folder, self._windows, self._plan = folder, windows, plan
        self._rank, self._world, self._first_step = rank, world, first_step
        self._queue: queue.Queue[Step | BaseException | None] = queue.Queue(PREFETCHED_STEPS)
        self._stopped = threading.Event()
        self._thread: threading.Thread | None = None

    def _put(self, value: Step | BaseException | None) -> None:
        while not self._stopped.is_set():
            try:
                return self._queue.put(value, timeout=0.1)
            except queue.Full:
                continue

    def _read_ahead(self) -> None:
        steps = self._plan.steps[self._first_step :]
        mine = [chosen for step in steps for _, chosen in share(step, self._rank, self._world)]
        if mine and self._folder.remote:
            self._folder.read_ahead(self._windows.user[np.concatenate(mine)])

    def _work(self) -> None:
        try:
            self._read_ahead()
            for index in range(self._first_step, len(self._plan.steps)):
                mine = share(self._plan.steps[index], self._rank, self._world)
                parts = [chosen for _, chosen in mine]
                batches = train_batches(self._folder, self._windows, parts, tie_seed=self._tie_seed)
                if self._stopped.is_set():
                    return
                self._put((index, [(m, batch) for (m, _), batch in zip(mine, batches, strict=True)]))
            self._put(None)
        except BaseException as error:
            self._put(error)

    def __iter__(self) -> Iterator[Step]:
        if self._thread is not None:
            raise RuntimeError("a TrainLoader is iterated once; make a new one for each epoch")
        self._thread = threading.Thread(target=self._work, name="findrec-loader", daemon=True)
        self._thread.start()
        try:
            while (value := self._queue.get()) is not None:
                if isinstance(value, BaseException):
                    raise value
                yield value
        finally:
            self.close()

    def close(self) -> None:
        """Stop the thread and wait for it."""
        self._stopped.set()
        if self._thread is not None and self._thread is not threading.current_thread():
            self._thread.join()

    def __enter__(self) -> TrainLoader:
        return self

    def __exit__(self, *_: Any) -> None:
        self.close()
