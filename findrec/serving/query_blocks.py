"""Histories for which lists are asked, and their blocks, which are cut so that padding stays small.

Shape letters: B rows.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import numpy as np
import torch

from findrec.datasets.batches.evaluation import Cases, history_batch
from findrec.datasets.folder.histories import Histories
from findrec.evaluation.scoring.users import UNKNOWN_USER, IntArray, UserBlock

_FEWEST = 32  # rows of a block that is cut to save padding


@dataclass(frozen=True)
class Asked:
    """B histories, of users of the data or of visitors, at the times of their queries.

    Attributes:
        labels: raw ids of the users, or labels of the visitors.
        length_B: number of known events; 0 for visitors without a known item.
        time_B: query times, seconds.
        histories: the histories of some rows.
        users: rows of the users in the data folder; None for visitors.
    """

    labels: list[str]
    length_B: IntArray
    time_B: IntArray
    histories: Callable[[IntArray], Histories]
    users: IntArray | None = None

    def blocks(
        self, max_length: int, num_items: int, users_per_block: int
    ) -> Iterator[tuple[IntArray, UserBlock]]:
        """Rows and blocks of all histories with events, cut to their last `max_length` events."""
        rows = np.flatnonzero(self.length_B)
        for part in rows_in_blocks(np.minimum(self.length_B[rows], max_length), users_per_block):
            chosen = rows[part]
            users = None if self.users is None else self.users[chosen]
            past = self.histories(chosen)
            yield chosen, history_block(past, self.time_B[chosen], max_length, num_items, users)


def rows_in_blocks(length_B: IntArray, users_per_block: int) -> Iterator[IntArray]:
    """Blocks of rows with similar lengths: at most `users_per_block`, and padding of at most a quarter.

    Blocks of fewer than `_FEWEST` rows are not worth what each costs.
    """
    order = np.argsort(length_B, kind="stable")
    begin, events = 0, 0
    for end, length in enumerate(length_B[order].tolist()):
        rows = end - begin
        padded = (rows + 1) * length > 4 / 3 * (events + length)
        if rows == users_per_block or (rows >= _FEWEST and padded):
            yield order[begin:end]
            begin, events = end, 0
        events += length
    if begin < len(order):
        yield order[begin:]


def history_block(
    past: Histories, time_B: IntArray, max_length: int, num_items: int, users: IntArray | None = None
) -> UserBlock:
    """A block of histories, each with at least one event, at query times `time_B`; targets are 0.

    `users` are the rows of their users in the data folder; without it their users are unknown.
    """
    past = past.from_zero()
    count = len(time_B)
    if users is None:
        users = np.full(count, UNKNOWN_USER, dtype=np.int64)
    size = np.minimum(np.diff(past.offset), max_length)
    kept = np.repeat(past.offset[1:] - np.cumsum(size), size) + np.arange(int(size.sum()))
    recent = past.take(kept, np.concatenate([[0], np.cumsum(size)]).astype(np.int64))
    row = torch.arange(count)
    cases = Cases(row, torch.from_numpy(users), torch.zeros_like(row), torch.from_numpy(time_B))
    batch = history_batch(recent, users, time_B, num_items)
    return UserBlock(users, batch, cases, past.item, past.offset)
