"""Blocks of users with their target cases and the histories that scorers may use.

Shape letters: B users (rows), N events or items, C target cases.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from findrec.datasets.batches.batch import Batch
from findrec.datasets.batches.evaluation import Cases, Part, evaluation_batch, queries
from findrec.datasets.folder.data_folder import DataFolder
from findrec.errors import FindRecError, suggest

IntArray = NDArray[np.int64]
UNKNOWN_USER = -1  # row of a user who is not in the data folder


@dataclass(frozen=True)
class UserBlock:
    """One row per user and query time: several rows of a user if every target has its own history."""

    user: IntArray  # [B] rows of the data folder, or UNKNOWN_USER
    batch: Batch  # their last `max_length` events
    cases: Cases
    item: IntArray  # [N] their complete histories, one after the other, oldest event first
    offset: IntArray  # [B + 1] the history of row b is item[offset[b]:offset[b + 1]]

    @staticmethod
    def read(folder: DataFolder, split: Part, users: IntArray, max_length: int) -> UserBlock:
        """Read the targets of `users` in a split, and the histories before them."""
        batch, cases = evaluation_batch(folder, split, users, max_length)
        rows = queries(folder, split, users)
        past = folder.histories(rows.user, np.zeros(len(rows.user), dtype=np.int64), rows.first)
        return UserBlock(rows.user, batch, cases, past.item, past.offset)

    def row(self) -> IntArray:
        """The row `[N]` of `user` that each event of `item` belongs to."""
        return np.repeat(np.arange(len(self.user)), np.diff(self.offset))

    def shortened(self, length: int) -> UserBlock:
        """The block with only the last `length` events of each complete history; the batch is unchanged."""
        size, row = np.diff(self.offset), self.row()
        kept = np.arange(len(row)) >= self.offset[1:][row] - length
        offset = np.concatenate([[0], np.cumsum(np.minimum(size, length))]).astype(np.int64)
        return replace(self, item=self.item[kept], offset=offset)

    def padded_items(self) -> Tensor:
        """Distinct items `[B, N]` of each complete history, ascending, 0-padded, for the seen filter."""
        stride = int(self.item.max(initial=0)) + 1
        key = np.unique(self.row() * stride + self.item)
        row, item = key // stride, key % stride
        size = np.bincount(row, minlength=len(self.user))
        start = np.cumsum(size) - size
        padded: IntArray = np.zeros((len(self.user), int(size.max(initial=0))), dtype=np.int64)
        padded[row, np.arange(len(row)) - start[row]] = item
        return torch.from_numpy(padded)


def user_rows(folder: DataFolder, users: Sequence[str]) -> IntArray:
    """Rows of users given by raw id; raises `FindRecError` for an unknown user."""
    rows = {name: row for row, name in enumerate(folder.user_ids)}
    for user in users:
        if user not in rows:
            raise FindRecError(
                f"no user {user!r} in {folder.path}{suggest(user, rows)} ({folder.num_users:,} users, the "
                f"first is {folder.user_ids[0]!r}). --user takes an id of the raw data"
            )
    return np.array([rows[user] for user in users], dtype=np.int64)
