"""The distinct user-item pairs of the training events, and sampling of negative items.

Shape letters: E pairs, P items that have training events, n rows.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import numpy as np
from numpy.typing import NDArray

from findrec.datasets.folder.data_folder import DataFolder
from findrec.datasets.folder.splits import Int64Array


@dataclass(frozen=True)
class TrainingPairs:
    """All pairs of a data folder in memory (24 bytes each), sorted by user row and item id.

    Negatives of a user are drawn uniformly, with replacement, from the items with training events, but none
    of this user. Items without training events are never positives, so drawing them as negatives would only
    teach the model to rank new items last.
    """

    user: Int64Array  # [E] rows of the data folder
    item: Int64Array  # [E] 1-based ids
    offset: Int64Array  # [num_users + 1] the pairs of a user are offset[u]:offset[u + 1]
    trained: Int64Array  # [P] ids of the items that have training events, ascending

    @staticmethod
    def read(folder: DataFolder) -> TrainingPairs:
        """Read all training events of the folder once."""
        stride = folder.num_items + 1
        parts, first = [np.zeros(0, dtype=np.int64)], 0  # an exported folder has no users
        for block in folder.blocks():
            events = np.diff(block.offset)
            row = np.repeat(np.arange(len(events)), events)
            position = np.arange(len(row)) - (block.offset[:-1] - block.offset[0])[row]
            user = first + row
            training = position < folder.valid_start[user]
            item = block.item[block.offset[0] : block.offset[-1]]
            parts.append(np.unique(user[training] * stride + item[training]))
            first += len(events)
        pairs = np.concatenate(parts).astype(np.int64)
        user, item = pairs // stride, pairs % stride
        offset = np.concatenate([[0], np.cumsum(np.bincount(user, minlength=folder.num_users))])
        return TrainingPairs(user, item, offset.astype(np.int64), np.unique(item))

    @property
    def has_negatives(self) -> NDArray[np.bool_]:
        """`[num_users]` whether there is a trained item without training events of the user."""
        return np.diff(self.offset) < len(self.trained)

    def draw(self, rng: np.random.Generator, user_n: Int64Array, count: int) -> Int64Array:
        """`[n, count]` negatives of the users `user_n`, each of whom must have some (`has_negatives`)."""
        known_n = np.diff(self.offset)[user_n]
        choice = rng.integers(0, (len(self.trained) - known_n)[:, None], size=(len(user_n), count))
        # The choice-th trained item that is not the user's own: skip own items with at most `choice` other
        # items before them.
        keys = user_n[:, None] * (len(self.trained) + 1) + choice
        skipped = np.searchsorted(self._others_before, keys, side="right") - self.offset[user_n][:, None]
        negatives: Int64Array = self.trained[choice + skipped]
        return negatives

    @cached_property
    def _others_before(self) -> Int64Array:
        """`[E]` ascending: user * (P + 1) + number of other users' trained items before this one."""
        rank = np.searchsorted(self.trained, self.item)
        own = np.arange(len(self.item)) - self.offset[self.user]
        return self.user * (len(self.trained) + 1) + rank - own


def negatives_rng(seed: int, epoch: int, chosen: Int64Array) -> np.random.Generator:
    """Random generator for the negatives of the microbatch with the examples `chosen`.

    An example is in one microbatch of an epoch, so the number of the first one identifies the microbatch,
    independent of the worker that reads it.
    """
    return np.random.default_rng([seed, epoch, int(chosen[0])])
