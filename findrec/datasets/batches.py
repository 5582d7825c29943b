"""From planned windows and evaluated users to right-padded batches, and the loader that runs ahead."""

from __future__ import annotations

import math
import queue
import threading
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from findrec.datasets.batch import Batch
from findrec.datasets.folder import DataFolder, Histories
from findrec.datasets.plan import EpochPlan, Windows, share
from findrec.datasets.splits import Int64Array

LARGEST_GAP = 31
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


def gap_buckets(timestamp: Int64Array, offset: Int64Array) -> Int64Array:
    """`[N]` time since the event before, in buckets that double: `1 + floor(log2(1 + seconds))`, at most 31.

    0 marks the first event shown of a history (what came before it is not known to the model) and padding.
    """
    seconds = np.maximum(np.diff(timestamp, prepend=timestamp[:1]), 0)
    bucket = np.minimum(1 + np.floor(np.log2(1.0 + seconds)).astype(np.int64), LARGEST_GAP)
    bucket[offset[:-1][np.diff(offset) > 0]] = 0
    return bucket


def gap_bucket(seconds: int) -> int:
    """The bucket of `gap_buckets` for one time that has passed."""
    return min(1 + math.floor(math.log2(1.0 + max(seconds, 0))), LARGEST_GAP)


@dataclass(frozen=True)
class _Padded:
    """Histories as the model sees them; `[B, L]` unless said otherwise."""

    item: Tensor
    gap: Tensor
    event: Tensor | None
    length: Tensor  # [B]
    place: Int64Array  # [N], each event's flat index b * L + l


def _padded(histories: Histories) -> _Padded:
    offset = histories.offset
    length = np.diff(offset)
    width = int(length.max())
    row = np.repeat(np.arange(len(length)), length)
    place = row * width + np.arange(offset[-1]) - offset[row]

    def spread(values: Int64Array) -> Tensor:
        flat: NDArray[np.int64] = np.zeros(len(length) * width, dtype=np.int64)
        flat[place] = values
        return torch.from_numpy(flat.reshape(len(length), width))

    return _Padded(
        item=spread(histories.item),
        gap=spread(gap_buckets(histories.timestamp, offset)),
        event=None if histories.event is None else spread(histories.event + 2),  # 0 padding, 1 unknown
        length=torch.from_numpy(length),
        place=place,
    )


def _hashed(seed: int, user: NDArray[np.int64], place: NDArray[np.int64]) -> NDArray[np.uint64]:
    """A pseudo-random key of every event, the same wherever it is asked for (splitmix64's finaliser)."""
    key = np.uint64(seed % 2**64) + user.astype(np.uint64) * np.uint64(0x9E3779B97F4A7C15)
    key = key + place.astype(np.uint64) * np.uint64(0xD1B54A32D192ED03)
    for shift, factor in ((30, 0xBF58476D1CE4E5B9), (27, 0x94D049BB133111EB)):
        key = (key ^ (key >> np.uint64(shift))) * np.uint64(factor)
    return key ^ (key >> np.uint64(31))


def shuffled_ties(folder: DataFolder, users: Int64Array, seed: int) -> Histories:
    """Training events of `users`, those of one timestamp in an order drawn anew for each seed.

    Events of one instant have no order of their own (films rated in one burst, a basket): a fixed one is
    learnt by heart. The order depends on the user and the seed alone, so the windows of a user agree.
    """
    whole = folder.histories(users, np.zeros(len(users), dtype=np.int64), folder.valid_start[users])
    row = np.repeat(np.arange(len(users)), np.diff(whole.offset))
    place = np.arange(len(row)) - whole.offset[row]
    order = np.lexsort((_hashed(seed, users[row], place), whole.timestamp, row))
    return whole.take(order, whole.offset)


def _slices(histories: Histories, start: Int64Array, stop: Int64Array) -> Histories:
    offset = np.concatenate([[0], np.cumsum(stop - start)]).astype(np.int64)
    row = np.repeat(np.arange(len(start)), stop - start)
    place = np.arange(len(row)) - offset[row] + start[row] + histories.offset[row]
    return histories.take(place, offset)


def train_batch(
    folder: DataFolder, windows: Windows, chosen: Int64Array, *, tie_seed: int | None = None
) -> Batch:
    """The batch of the windows `chosen`: every event of `[first_target, stop)` is asked for once, at the
    position of the event before it. With `tie_seed`, events of one timestamp are shuffled by it.
    """
    user, start, stop = windows.user[chosen], windows.start[chosen], windows.stop[chosen]
    if tie_seed is None:
        whole = folder.histories(user, start, stop)  # inputs and, one later, their targets
    else:
        whole = _slices(shuffled_ties(folder, user, tie_seed), start, stop)
    ends = whole.offset[1:]
    shown = np.ones(len(whole.item), dtype=bool)
    shown[ends - 1] = False
    inputs = whole.take(shown.nonzero()[0], whole.offset - np.arange(len(whole.offset)))
    padded = _padded(inputs)
    row = np.repeat(np.arange(len(chosen)), np.diff(inputs.offset))
    event = np.arange(len(row)) - inputs.offset[row] + start[row]  # place of each input in its history
    asked = event + 1 >= windows.first_target[chosen][row]
    later = np.delete(np.arange(len(whole.item)), whole.offset[:-1])[asked]  # the event after each position
    return Batch.build(
        item=padded.item,
        length=padded.length,
        user=torch.from_numpy(user),
        position=torch.from_numpy(padded.place[asked]),
        target=torch.from_numpy(whole.item[later]),
        gap=padded.gap,
        event=padded.event,
        wait=torch.from_numpy(gap_buckets(whole.timestamp, whole.offset)[later]),
    )


def _cuts(folder: DataFolder, split: Part) -> tuple[Int64Array, Int64Array]:
    """First and one past the last target event of every user."""
    if split == "valid":
        return folder.valid_start, folder.test_start
    if split == "test":
        return folder.test_start, folder.length
    raise ValueError(f"split must be 'valid' or 'test', not {split!r}")


def evaluated_users(folder: DataFolder, split: Part) -> Int64Array:
    """User rows with a target in the split and at least one training event, ascending.

    Only a global_temporal split knows others: users who came after its first cut, of whom nothing is learnt.
    """
    first, last = _cuts(folder, split)
    return np.flatnonzero((last > first) & (folder.valid_start > 0))


def evaluation_blocks(folder: DataFolder, split: Part, users_per_block: int) -> list[Int64Array]:
    """The `evaluated_users`, by length of history, in blocks.

    The blocks are the same for any number of workers; rank r of W takes blocks r, r + W, ...
    """
    first, _ = _cuts(folder, split)
    users = evaluated_users(folder, split)
    users = users[np.argsort(first[users], kind="stable")]
    return [users[begin : begin + users_per_block] for begin in range(0, len(users), users_per_block)]


def evaluation_batch(
    folder: DataFolder, split: Part, users: Int64Array, max_length: int
) -> tuple[Batch, Cases]:
    """The last `max_length` events of each user before the split's targets, and those targets.

    `position` is the last valid place of each row and `target` is empty: a row's one vector ranks all of its
    targets, which are several where a basket, a share or a period of time is asked for.
    """
    first, last = _cuts(folder, split)
    start = np.maximum(first[users] - max_length, 0)
    padded = _padded(folder.histories(users, start, first[users]))
    turn = folder.histories(users, first[users] - 1, first[users] + 1)  # last event shown, first asked for
    batch = Batch.build(
        item=padded.item,
        length=padded.length,
        user=torch.from_numpy(users.astype(np.int64)),
        position=torch.arange(len(users)) * padded.item.shape[1] + padded.length - 1,
        target=torch.zeros(0, dtype=torch.int64),
        gap=padded.gap,
        event=padded.event,
        wait=torch.from_numpy(gap_buckets(turn.timestamp, turn.offset)[1::2]),
    )
    targets = folder.histories(users, first[users], last[users])
    row = np.repeat(np.arange(len(users)), np.diff(targets.offset))
    return batch, Cases(
        row=torch.from_numpy(row),
        user=torch.from_numpy(users[row].astype(np.int64)),
        target=torch.from_numpy(targets.item),
        time=torch.from_numpy(targets.timestamp),
    )


def target_times(folder: DataFolder, split: Part, users: Int64Array) -> Int64Array:
    """`[C]` times (s) of the split's targets of `users`, user by user."""
    first, last = _cuts(folder, split)
    return folder.histories(users, first[users], last[users]).timestamp


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

    def _work(self) -> None:
        try:
            for index in range(self._first_step, len(self._plan.steps)):
                mine = share(self._plan.steps[index], self._rank, self._world)
                batches = [
                    (m, train_batch(self._folder, self._windows, chosen, tie_seed=self._tie_seed))
                    for m, chosen in mine
                ]
                if self._stopped.is_set():
                    return
                self._put((index, batches))
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
