"""Baselines that need no training: popularity, item co-occurrence, a user's own most frequent items.

All are fitted on the training events only and know a user's whole history before the target. They are the
honest yardstick: on repeat consumption a user's own frequent items are hard to beat.

Shape letters: B users, V items, N neighbours kept of an item, P pairs of events.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator

import numpy as np
from numpy.typing import NDArray

from findrec.datasets.folder import DataFolder
from findrec.errors import FindRecError, suggest
from findrec.evaluation.scorers import BlockScorer, IntArray, Scorer, TextKNN, UserBlock, popularity_rank

_EVENTS_AT_ONCE = 1 << 20
_PAIRS_AT_ONCE = 1 << 22


class Popularity(BlockScorer):
    """The number of training events of an item, the same for every user."""

    name = "popularity"

    def __init__(self, folder: DataFolder) -> None:
        self.popularity = popularity_rank(folder)

    def score_block(self, block: UserBlock, lo: int, hi: int) -> NDArray[np.float64]:
        """See `BlockScorer`. The dense rank of the counts is scored: the same order, exact in float32."""
        return np.tile(self.popularity[lo:hi].astype(np.float64), (len(block.user), 1))


class OwnFrequent(BlockScorer):
    """The user's own items by number of events, then the later last event; all others by popularity."""

    name = "own_frequent"

    def __init__(self, folder: DataFolder) -> None:
        self.popularity = popularity_rank(folder)
        self._held: tuple[UserBlock, tuple[IntArray, IntArray, IntArray]] | None = None

    def score_block(self, block: UserBlock, lo: int, hi: int) -> NDArray[np.float64]:
        """See `BlockScorer`. An own item's score is its place in the user's order, counted from below."""
        if self._held is None or self._held[0] is not block:  # a block is asked for range after range
            self._held = block, self._places(block)
        owner, item, place = self._held[1]
        scores = np.zeros((len(block.user), hi - lo))
        inside = (item >= lo) & (item < hi)
        scores[owner[inside], item[inside] - lo] = place[inside]
        return scores

    def _places(self, block: UserBlock) -> tuple[IntArray, IntArray, IntArray]:
        row, stride = block.row(), len(self.popularity)
        key, inverse, count = np.unique(row * stride + block.item, return_inverse=True, return_counts=True)
        latest: IntArray = np.zeros(len(key), dtype=np.int64)
        np.maximum.at(latest, inverse.reshape(-1), np.arange(len(row)))
        owner, item = key // stride, key % stride
        order = np.lexsort((latest, count, owner))
        size = np.bincount(owner, minlength=len(block.user))
        place: IntArray = np.empty(len(key), dtype=np.int64)
        place[order] = np.arange(len(key)) - (np.cumsum(size) - size)[owner[order]] + 1
        return owner, item, place


class Cooccurrence(BlockScorer):
    """Items that occur close to a user's last ones in the training histories.

    A pair of events `distance <= window` apart in one history adds `window + 1 - distance` to both items'
    link (an item may link to itself: that is a repeat). `link / sqrt(events a * events b)` is the similarity
    of a and b, of which each item keeps its `neighbours` largest. A user's score for b is the sum over the
    `last` events a, counted back from the newest with age 0, 1, ..., of `decay ** age * similarity(a, b)`.
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
        """See `BlockScorer`. Sums run from the newest event back, for each user by itself."""
        num_users, width = len(block.user), hi - lo
        flat = np.zeros(num_users * width)
        for age in range(self._last):
            place = block.offset[1:] - 1 - age
            row = np.flatnonzero(place >= block.offset[:-1])
            item = block.item[place[row]]
            size = self._start[item + 1] - self._start[item]
            which = np.arange(size.sum()) - np.repeat(np.cumsum(size) - size - self._start[item], size)
            neighbour = self._neighbour[which]
            inside = (neighbour >= lo) & (neighbour < hi)
            cell = np.repeat(row, size)[inside] * width + neighbour[inside] - lo
            flat[cell] += self._decay**age * self._similarity[which[inside]]  # cells of one age are distinct
        return flat.reshape(num_users, width)


def _item_ranges(train_count: IntArray, window: int) -> Iterator[tuple[int, int]]:
    """Cut the catalogue so that the links of one range fit in memory (about `_PAIRS_AT_ONCE` of them)."""
    pairs = np.cumsum(train_count) * 2 * window
    parts = int(pairs[-1] // _PAIRS_AT_ONCE) + 1
    cuts = np.searchsorted(pairs, np.arange(1, parts) * (pairs[-1] / parts))
    edges = np.unique(np.concatenate([[0], cuts, [len(train_count)]]))
    yield from itertools.pairwise(edges.tolist())


def _nearest(
    folder: DataFolder, window: int, neighbours: int, lo: int, hi: int
) -> tuple[IntArray, IntArray, NDArray[np.float64]]:
    """`(item, neighbour, similarity)` of the items lo..hi-1, by item, the most similar first."""
    stride, base = folder.num_items + 1, window + 1
    found: list[IntArray] = [np.zeros(0, dtype=np.int64)]
    for row, item in _training_events(folder):
        for distance in range(1, window + 1):
            a, b = item[:-distance], item[distance:]
            same = row[:-distance] == row[distance:]
            for one, other in ((a, b), (b, a)):
                chosen = same & (one >= lo) & (one < hi)
                found.append((one[chosen] * stride + other[chosen]) * base + (base - distance))
    # Pair and weight in one integer: a plain sort brings equal pairs together, and their sums are exact.
    pairs = np.concatenate(found)
    del found
    pairs.sort()
    keys, weight = pairs // base, pairs % base
    first = np.flatnonzero(np.diff(keys, prepend=-1))
    links = np.add.reduceat(weight, first) if len(first) else weight
    item, neighbour = keys[first] // stride, keys[first] % stride
    similarity = links / np.sqrt(folder.train_count[item].astype(np.float64) * folder.train_count[neighbour])
    order = np.lexsort((-similarity, item))  # stable: equal ones stay in the order of ids
    item, neighbour, similarity = item[order], neighbour[order], similarity[order]
    kept = np.arange(len(item)) - np.searchsorted(item, item) < neighbours
    return item[kept], neighbour[kept], similarity[kept]


def _training_events(folder: DataFolder) -> Iterator[tuple[IntArray, IntArray]]:
    """`(user, item)` of the training events, whole users at a time, some `_EVENTS_AT_ONCE` events each."""
    ends = np.cumsum(folder.valid_start)
    cuts = np.searchsorted(ends, np.arange(_EVENTS_AT_ONCE, ends[-1] + _EVENTS_AT_ONCE, _EVENTS_AT_ONCE)) + 1
    edges = np.unique(np.minimum(np.concatenate([[0], cuts, [len(ends)]]), len(ends)))
    for first, last in itertools.pairwise(edges.tolist()):
        users = np.arange(first, last)
        events = folder.histories(users, np.zeros(len(users), dtype=np.int64), folder.valid_start[users])
        yield np.repeat(users, np.diff(events.offset)), events.item


_BASELINES: dict[str, Callable[[DataFolder], Scorer]] = {
    "popularity": Popularity,
    "cooccurrence": Cooccurrence,
    "own_frequent": OwnFrequent,
    "text_knn": TextKNN,
}


def baseline_names() -> list[str]:
    """Names `make_baseline` knows. Trained baselines (SASRec) are models, not listed here."""
    return list(_BASELINES)


def make_baseline(name: str, folder: DataFolder) -> Scorer:
    """Fit a baseline on the training events of a folder; `FindRecError` for an unknown name."""
    if name not in _BASELINES:
        raise FindRecError(
            f"evaluation.baselines: unknown baseline {name!r}{suggest(name, [*_BASELINES, 'sasrec'])} "
            f"(there: {', '.join([*_BASELINES, 'sasrec'])})"
        )
    return _BASELINES[name](folder)
