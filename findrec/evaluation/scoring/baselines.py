"""Baselines that need no training: popularity, item co-occurrence, and a user's most frequent items.

All are fitted on the training events only and use a user's complete history before the target.

Shape letters: B users, V items.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from typing import Any

import numpy as np
from numpy.typing import NDArray

from findrec.baseline_configs import BaselineConfig
from findrec.datasets.folder.data_folder import DataFolder
from findrec.evaluation.scoring.base import Scorer
from findrec.evaluation.scoring.blocks import BlockScorer, popularity_rank
from findrec.evaluation.scoring.users import IntArray, UserBlock
from findrec.models.configs import import_object

_EVENTS_PER_CHUNK = 1 << 20
_PAIRS_PER_CHUNK = 1 << 22


class Popularity(BlockScorer):
    """The number of training events of an item, the same for every user."""

    name = "popularity"

    def __init__(self, folder: DataFolder) -> None:
        self.popularity = popularity_rank(folder)

    def score_block(self, block: UserBlock, lo: int, hi: int) -> NDArray[np.float64]:
        """See `BlockScorer`. The dense rank of the counts is scored: the same order, exact in float32."""
        return np.tile(self.popularity[lo:hi].astype(np.float64), (len(block.user), 1))


class OwnFrequent(BlockScorer):
    """The items of the user's history by number of events, then by recency; other items by popularity."""

    name = "own_frequent"

    def __init__(self, folder: DataFolder) -> None:
        self.popularity = popularity_rank(folder)
        self._cache: tuple[UserBlock, tuple[IntArray, IntArray, IntArray]] | None = None

    def score_block(self, block: UserBlock, lo: int, hi: int) -> NDArray[np.float64]:
        """See `BlockScorer`. An item of the history scores its rank in the user's order, lowest first."""
        if self._cache is None or self._cache[0] is not block:  # ranges of a block are scored in turn
            self._cache = block, self._history_ranks(block)
        owner, item, rank = self._cache[1]
        scores = np.zeros((len(block.user), hi - lo))
        inside = (item >= lo) & (item < hi)
        scores[owner[inside], item[inside] - lo] = rank[inside]
        return scores

    def _history_ranks(self, block: UserBlock) -> tuple[IntArray, IntArray, IntArray]:
        row, stride = block.row(), len(self.popularity)
        key, inverse, count = np.unique(row * stride + block.item, return_inverse=True, return_counts=True)
        latest: IntArray = np.zeros(len(key), dtype=np.int64)
        np.maximum.at(latest, inverse.reshape(-1), np.arange(len(row)))
        owner, item = key // stride, key % stride
        order = np.lexsort((latest, count, owner))
        size = np.bincount(owner, minlength=len(block.user))
        rank: IntArray = np.empty(len(key), dtype=np.int64)
        rank[order] = np.arange(len(key)) - (np.cumsum(size) - size)[owner[order]] + 1
        return owner, item, rank


class Cooccurrence(BlockScorer):
    """Items that co-occur with a user's last items in the training histories.

    Two events of one history at `distance <= window` add `window + 1 - distance` to the link between their
    items (of an item to itself for a repeat). The similarity is `link / sqrt(events a * events b)`; each item
    keeps its `neighbours` largest. The score of b is the sum of `decay ** age * similarity(a, b)` over the
    user's `last` events a with age 0, 1, ... from the newest.
    """

    name = "cooccurrence"

    def __init__(
        self,
        folder: DataFolder,
        *,
        window: int = 10,
        last: int = 10,
        decay: float = 0.8,
        neighbours: int = 200,
    ) -> None:
        self.popularity = popularity_rank(folder)
        self._last, self._decay = last, decay
        parts = [
            _nearest(folder, window, neighbours, lo, hi)
            for lo, hi in _item_ranges(folder.train_count, window)
        ]
        item = np.concatenate([part[0] for part in parts])
        self._neighbour = np.concatenate([part[1] for part in parts])
        self._similarity = np.concatenate([part[2] for part in parts])
        self._start = np.searchsorted(item, np.arange(folder.num_items + 2))

    def score_block(self, block: UserBlock, lo: int, hi: int) -> NDArray[np.float64]:
        """See `BlockScorer`; sums start with each user's newest event."""
        num_users, width = len(block.user), hi - lo
        flat = np.zeros(num_users * width)
        for age in range(self._last):
            event = block.offset[1:] - 1 - age
            row = np.flatnonzero(event >= block.offset[:-1])
            item = block.item[event[row]]
            size = self._start[item + 1] - self._start[item]
            which = np.arange(size.sum()) - np.repeat(np.cumsum(size) - size - self._start[item], size)
            neighbour = self._neighbour[which]
            inside = (neighbour >= lo) & (neighbour < hi)
            cell = np.repeat(row, size)[inside] * width + neighbour[inside] - lo
            flat[cell] += self._decay**age * self._similarity[which[inside]]  # cells are distinct
        return flat.reshape(num_users, width)


def _item_ranges(train_count: IntArray, window: int) -> Iterator[tuple[int, int]]:
    """Cut the catalogue into ranges of items with about `_PAIRS_PER_CHUNK` links each."""
    pairs = np.cumsum(train_count) * 2 * window
    parts = int(pairs[-1] // _PAIRS_PER_CHUNK) + 1
    cuts = np.searchsorted(pairs, np.arange(1, parts) * (pairs[-1] / parts))
    edges = np.unique(np.concatenate([[0], cuts, [len(train_count)]]))
    yield from itertools.pairwise(edges.tolist())


def _nearest(
    folder: DataFolder, window: int, neighbours: int, lo: int, hi: int
) -> tuple[IntArray, IntArray, NDArray[np.float64]]:
    """`(item, neighbour, similarity)` of the items lo..hi-1, by item, most similar first."""
    stride, base = folder.num_items + 1, window + 1
    chunks: list[IntArray] = [np.zeros(0, dtype=np.int64)]
    for row, item in _training_events(folder):
        for distance in range(1, window + 1):
            a, b = item[:-distance], item[distance:]
            same = row[:-distance] == row[distance:]
            for one, other in ((a, b), (b, a)):
                chosen = same & (one >= lo) & (one < hi)
                chunks.append((one[chosen] * stride + other[chosen]) * base + (base - distance))
    # Pair and weight in one integer: sorting groups equal pairs, and their sums are exact.
    pairs = np.concatenate(chunks)
    del chunks
    pairs.sort()
    keys, weight = pairs // base, pairs % base
    first = np.flatnonzero(np.diff(keys, prepend=-1))
    links = np.add.reduceat(weight, first) if len(first) else weight
    item, neighbour = keys[first] // stride, keys[first] % stride
    similarity = links / np.sqrt(folder.train_count[item].astype(np.float64) * folder.train_count[neighbour])
    order = np.lexsort((-similarity, item))  # stable: ties stay in the order of ids
    item, neighbour, similarity = item[order], neighbour[order], similarity[order]
    kept = np.arange(len(item)) - np.searchsorted(item, item) < neighbours
    return item[kept], neighbour[kept], similarity[kept]


def _training_events(folder: DataFolder) -> Iterator[tuple[IntArray, IntArray]]:
    """Yield `(user, item)` of the training events in chunks of about `_EVENTS_PER_CHUNK`, by whole users."""
    ends = np.cumsum(folder.valid_start)
    cuts = (
        np.searchsorted(ends, np.arange(_EVENTS_PER_CHUNK, ends[-1] + _EVENTS_PER_CHUNK, _EVENTS_PER_CHUNK))
        + 1
    )
    edges = np.unique(np.minimum(np.concatenate([[0], cuts, [len(ends)]]), len(ends)))
    for first, last in itertools.pairwise(edges.tolist()):
        users = np.arange(first, last)
        events = folder.histories(users, np.zeros(len(users), dtype=np.int64), folder.valid_start[users])
        yield np.repeat(users, np.diff(events.offset)), events.item


def make_baseline(config: BaselineConfig, folder: DataFolder, **kwargs: Any) -> Scorer:
    """Fit a baseline on the training events of a folder; `kwargs` are passed to its class."""
    keys = config.model_dump(exclude={"name", "label"})
    scorer: Scorer = import_object(config.implementation, "evaluation.baselines")(folder, **keys, **kwargs)
    scorer.name = config.title
    return scorer
