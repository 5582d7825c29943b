"""A batch of index searches as NumPy arrays, and the array functions that filter and sort its results.

NumPy, because the overhead of torch would dominate the search for a single user.

Shape letters: B users, V items, d width, K items, M excluded items, N repeat candidates.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from findrec.evaluation.scoring.base import Times
from findrec.evaluation.scoring.user_vectors import UserVectors

Ints = NDArray[np.int64]
Floats = NDArray[np.float32]


@dataclass(frozen=True)
class SearchBatch:
    """User vectors and the filters and bonuses of each user."""

    users_Bd: Floats
    own_BN: Ints | None  # repeat candidates
    bonus_BN: Floats | None
    seen_BM: Ints | None  # ascending
    since_V: Ints | None
    time_B: Ints | None

    @staticmethod
    def of(queries: UserVectors, seen_BN: Tensor | None, times: Times | None) -> SearchBatch:
        """Convert the tensors of scorers and candidates to arrays on the CPU."""
        own, bonus = queries.own_ids_BN, queries.own_bonus_BN
        with_own = own is not None and bonus is not None
        return SearchBatch(
            np.ascontiguousarray(as_array(queries.single()), dtype=np.float32),
            as_array(own) if with_own else None,
            as_array(bonus) if with_own else None,
            None if seen_BN is None else np.sort(as_array(seen_BN), axis=1),
            None if times is None else as_array(times.since_V),
            None if times is None else as_array(times.time_B),
        )

    def rows(self, rows: Ints) -> SearchBatch:
        """The batch of some of the users."""
        if len(rows) == len(self.users_Bd):
            return self
        parts: list[Any] = [self.own_BN, self.bonus_BN, self.seen_BM, self.time_B]
        own, bonus, seen, time = (None if part is None else part[rows] for part in parts)
        return SearchBatch(self.users_Bd[rows], own, bonus, seen, self.since_V, time)

    def too_late(self, ids_BK: Ints) -> NDArray[np.bool_] | bool:
        """Whether each item `[B, K]` is not yet available at its user's time; False if all are."""
        if self.since_V is None or self.time_B is None:
            return False
        return np.asarray(self.since_V[ids_BK] > self.time_B[:, None])

    def removed(self) -> Ints | None:
        """Ids `[B, M]` to drop from the fetched items, ascending: seen items and items with a bonus."""
        if self.own_BN is None:
            return self.seen_BM
        parts = [self.own_BN] if self.seen_BM is None else [self.own_BN, self.seen_BM]
        return np.sort(np.concatenate(parts, axis=1), axis=1)


def as_array(values: Tensor | None) -> NDArray[Any]:
    """A tensor as a NumPy array on the CPU."""
    assert values is not None
    return values.detach().cpu().numpy()


def among(ids_BK: Ints, sorted_BM: Ints, stride: int) -> NDArray[np.bool_]:
    """Whether each id `[B, K]` (< `stride`) is in its row of `sorted_BM`."""
    if not sorted_BM.size:
        return np.zeros(ids_BK.shape, dtype=bool)
    first_B = stride * np.arange(len(ids_BK))[:, None]
    known, wanted = (sorted_BM + first_B).ravel(), ids_BK + first_B
    return np.asarray(known[np.minimum(np.searchsorted(known, wanted), known.size - 1)] == wanted)


def count_distinct(sorted_BM: Ints, counts_V: NDArray[np.bool_]) -> Ints:
    """Number `[B]` of distinct ids of each row that are marked in `counts_V`."""
    marked = counts_V[sorted_BM]
    marked[:, 1:] &= sorted_BM[:, 1:] != sorted_BM[:, :-1]
    return np.asarray(marked.sum(1))


def best(ids_BK: Ints, scores_BK: Floats, k: int) -> tuple[Ints, Floats]:
    """The k best columns by score, best first; id 0 where the score is -inf or NaN."""
    np.nan_to_num(scores_BK, copy=False, nan=-np.inf, posinf=np.inf, neginf=-np.inf)
    k = min(k, ids_BK.shape[1])
    if k < ids_BK.shape[1]:
        kept = np.argpartition(scores_BK, -k, axis=1)[:, -k:]
        ids_BK, scores_BK = np.take_along_axis(ids_BK, kept, 1), np.take_along_axis(scores_BK, kept, 1)
    order = np.argsort(-scores_BK, axis=1, kind="stable")
    ids_BK, scores_BK = np.take_along_axis(ids_BK, order, 1), np.take_along_axis(scores_BK, order, 1)
    return np.where(scores_BK == -np.inf, 0, ids_BK), scores_BK
