"""What users ask an index for, and what is taken from the answer. NumPy: a query of one user is short, and
torch slow to begin with.

Shape letters: B users, V items, d width, K items, M left out, N own or seen.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from findrec.evaluation.scorers import Queries
from findrec.evaluation.topk import Late

Ints = NDArray[np.int64]
Floats = NDArray[np.float32]


@dataclass(frozen=True)
class Asked:
    """Users and what counts for each."""

    users_Bd: Floats
    own_BN: Ints | None
    bonus_BN: Floats | None
    seen_BM: Ints | None  # ascending
    since_V: Ints | None
    time_B: Ints | None

    @staticmethod
    def of(queries: Queries, seen_BN: Tensor | None, late: Late | None) -> Asked:
        """On the CPU, from what scorers and candidates give."""
        own, bonus = queries.own_ids_BN, queries.own_bonus_BN
        with_own = own is not None and bonus is not None
        return Asked(
            np.ascontiguousarray(as_array(queries.users_Bd), dtype=np.float32),
            as_array(own) if with_own else None,
            as_array(bonus) if with_own else None,
            None if seen_BN is None else np.sort(as_array(seen_BN), axis=1),
            None if late is None else as_array(late[0]),
            None if late is None else as_array(late[1]),
        )

    def rows(self, rows: Ints) -> Asked:
        """The same for some of the users."""
        if len(rows) == len(self.users_Bd):
            return self
        parts: list[Any] = [self.own_BN, self.bonus_BN, self.seen_BM, self.time_B]
        own, bonus, seen, time = (None if part is None else part[rows] for part in parts)
        return Asked(self.users_Bd[rows], own, bonus, seen, self.since_V, time)

    def too_late(self, ids_BK: Ints) -> NDArray[np.bool_] | bool:
        """`[B, K]` whether an item comes too late for its user; False where none does."""
        if self.since_V is None or self.time_B is None:
            return False
        return np.asarray(self.since_V[ids_BK] > self.time_B[:, None])

    def removed(self) -> Ints | None:
        """`[B, M]` ids to leave out of what is fetched, ascending: seen and own items."""
        if self.own_BN is None:
            return self.seen_BM
        parts = [self.own_BN] if self.seen_BM is None else [self.own_BN, self.seen_BM]
        return np.sort(np.concatenate(parts, axis=1), axis=1)


def as_array(values: Tensor | None) -> NDArray[Any]:
    """A tensor as a NumPy array on the CPU."""
    assert values is not None
    return values.detach().cpu().numpy()


def among(ids_BK: Ints, sorted_BM: Ints, stride: int) -> NDArray[np.bool_]:
    """`[B, K]` whether each id, below `stride`, is in its row of `sorted_BM`."""
    if not sorted_BM.size:
        return np.zeros(ids_BK.shape, dtype=bool)
    first_B = stride * np.arange(len(ids_BK))[:, None]
    known, asked = (sorted_BM + first_B).ravel(), ids_BK + first_B
    return np.asarray(known[np.minimum(np.searchsorted(known, asked), known.size - 1)] == asked)


def count_distinct(sorted_BM: Ints, counts_V: NDArray[np.bool_]) -> Ints:
    """`[B]` distinct ids of each row that are marked in `counts_V`."""
    marked = counts_V[sorted_BM]
    marked[:, 1:] &= sorted_BM[:, 1:] != sorted_BM[:, :-1]
    return np.asarray(marked.sum(1))


def best(ids_BK: Ints, scores_BK: Floats, k: int) -> tuple[Ints, Floats]:
    """The first k columns by score, best first; id 0 where the score is -inf or no number."""
    np.nan_to_num(scores_BK, copy=False, nan=-np.inf, posinf=np.inf, neginf=-np.inf)
    k = min(k, ids_BK.shape[1])
    if k < ids_BK.shape[1]:
        place = np.argpartition(scores_BK, -k, axis=1)[:, -k:]
        ids_BK, scores_BK = np.take_along_axis(ids_BK, place, 1), np.take_along_axis(scores_BK, place, 1)
    order = np.argsort(-scores_BK, axis=1, kind="stable")
    ids_BK, scores_BK = np.take_along_axis(ids_BK, order, 1), np.take_along_axis(scores_BK, order, 1)
    return np.where(scores_BK == -np.inf, 0, ids_BK), scores_BK
