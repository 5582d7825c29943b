"""Evaluated users, the queries (times of their predictions), and batches of their histories."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Literal

import numpy as np
import torch
from torch import Tensor

from findrec.datasets.batches.batch import Batch
from findrec.datasets.batches.padding import gap_buckets, padded_batch
from findrec.datasets.folder.data_folder import DataFolder
from findrec.datasets.folder.histories import Histories
from findrec.datasets.folder.splits import Int64Array, unit_starts

Part = Literal["valid", "test"]


@dataclass(frozen=True)
class Cases:
    """Evaluated targets: case c is the target `target[c]` of row `row[c]` of a batch. All `[C]` int64."""

    row: Tensor
    user: Tensor  # row of the user in the data folder
    target: Tensor
    time: Tensor  # of the target's event, in seconds


def _cuts(folder: DataFolder, split: Part) -> tuple[Int64Array, Int64Array]:
    """First target event of every user, and the end of its targets."""
    if split == "valid":
        return folder.valid_start, folder.test_start
    if split == "test":
        return folder.test_start, folder.length
    raise ValueError(f"split must be 'valid' or 'test', not {split!r}")


@dataclass(frozen=True)
class Queries:
    """Predictions to evaluate: row b predicts events `[first, last)` of its user from those before `first`.

    All `[B]` int64; the queries of a user are consecutive and in order of time.
    """

    user: Int64Array  # rows of the data folder
    first: Int64Array
    last: Int64Array


def has_query_per_unit(folder: DataFolder) -> bool:
    """Whether every unit of a part has its own query (in a `tail` split)."""
    return folder.manifest.split.get("kind") == "tail"


def queries(folder: DataFolder, split: Part, users: Int64Array) -> Queries:
    """The queries of `users`: one for all targets of a user or, in a `tail` split, one for each unit."""
    first, last = (cut[users] for cut in _cuts(folder, split))
    if not has_query_per_unit(folder):
        return Queries(users, first, last)
    targets = folder.histories(users, first, last)
    begins = unit_starts(targets.timestamp, targets.offset, str(folder.manifest.split.get("unit", "event")))
    unit = np.flatnonzero(begins)
    row = np.searchsorted(targets.offset, unit, side="right") - 1
    begin = first[row] + unit - targets.offset[row]
    end = begin + np.diff(np.append(unit, len(begins)))
    return Queries(users[row], begin, end)


def evaluated_users(folder: DataFolder, split: Part) -> Int64Array:
    """User rows with a target in the split and at least one event before it, ascending.

    In a global_temporal split, users without training events are included in the test if they have events
    before the second cut.
    """
    first, last = _cuts(folder, split)
    return np.flatnonzero((last > first) & (first > 0))


def evaluation_blocks(
    folder: DataFolder, split: Part, users_per_block: int, sample: int | None = None
) -> list[Int64Array]:
    """The `evaluated_users`, sorted by length of history, in blocks.

    The blocks are the same for any number of workers; rank r of W takes blocks r, r + W, ... If users have
    several queries, a block has fewer users, so that it has no more rows. `sample` limits the number of
    users; the sample depends only on the data.
    """
    first, last = _cuts(folder, split)
    if has_query_per_unit(folder):
        users_per_block = max(1, users_per_block // max(1, int((last - first).max(initial=1))))
    users = evaluated_users(folder, split)
    if sample is not None and sample < len(users):
        users = np.sort(np.random.default_rng(0).choice(users, sample, replace=False))
    users = users[np.argsort(first[users], kind="stable")]
    return [users[begin : begin + users_per_block] for begin in range(0, len(users), users_per_block)]


def evaluation_batch(
    folder: DataFolder, split: Part, users: Int64Array, max_length: int
) -> tuple[Batch, Cases]:
    """The histories (last `max_length` events) of the users' `queries`, and their targets.

    In the batch, `position` is the last valid position of each row and `target` is empty: the one vector of a
    row ranks all of its targets, of which there can be several.
    """
    rows = queries(folder, split, users)
    users = rows.user
    targets = folder.histories(users, rows.first, rows.last)
    batch = query_batch(folder, users, rows.first, targets.timestamp[targets.offset[:-1]], max_length)
    row = np.repeat(np.arange(len(users)), np.diff(targets.offset))
    return batch, Cases(
        row=torch.from_numpy(row),
        user=torch.from_numpy(users[row].astype(np.int64)),
        target=torch.from_numpy(targets.item),
        time=torch.from_numpy(targets.timestamp),
    )


def query_batch(
    folder: DataFolder, users: Int64Array, stop: Int64Array, time: Int64Array, max_length: int
) -> Batch:
    """The last `max_length` of the first `stop` `[B]` (at least 1) events of each of the users `[B]`.

    See `history_batch`.
    """
    past = folder.histories(users, np.maximum(stop - max_length, 0), stop)
    return history_batch(past, users, time, folder.num_items)


def history_batch(past: Histories, users: Int64Array, time: Int64Array, num_items: int) -> Batch:
    """A batch of the histories `past`, each of which needs at least one event, of the users `[B]`.

    `time` `[B]` is the time of the prediction in seconds. In the batch, `position` is the last valid position
    of each row, and `target` is empty.
    """
    batch = padded_batch(past, users, num_items)
    last = past.timestamp[past.offset[1:] - 1]
    times = np.stack([last, time], axis=1).reshape(-1)
    return replace(
        batch,
        position=torch.arange(len(users)) * batch.item.shape[1] + batch.length - 1,
        wait=torch.from_numpy(gap_buckets(times, 2 * np.arange(len(users) + 1))[1::2]),
        query_time=torch.from_numpy(time.astype(np.int64)),
    )


def target_events(folder: DataFolder, split: Part, users: Int64Array) -> Histories:
    """The target events of `users` in a split."""
    first, last = _cuts(folder, split)
    return folder.histories(users, first[users], last[users])
