"""Which items compete for which target: all of the catalogue, or those that were on offer at its time.

An item competes for the targets of its `DataFolder.available_from` and later, whatever its id; an item that
is gone from the catalogue (`DataFolder.gone`) never does. Nothing but these times is held: the rankers mask
the tiles they score (Ji et al., TOIS 2023, on what ranking items before their time does to results).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from findrec.datasets.batches import Cases, Part, target_times
from findrec.datasets.folder import ALWAYS, NEVER, DataFolder

Rule = Literal["all", "available"]


@dataclass(frozen=True)
class Candidates:
    """Item v competes for targets of the time `since_V[v]` (`[V + 1]` int64, s) and later."""

    since_V: Tensor | None  # None: all items always compete

    @staticmethod
    def of(folder: DataFolder, rule: Rule) -> Candidates:
        """The candidates of a data folder; `available` goes by the items' times, `all` by `gone` alone."""
        since_V = folder.available_from if rule == "available" else np.full(folder.num_items + 1, ALWAYS)
        since_V = np.where(folder.gone, NEVER, since_V)
        since_V[0] = ALWAYS  # padding is left out by the rankers themselves
        return Candidates(None if (since_V == ALWAYS).all() else torch.from_numpy(since_V))

    def late(self, cases: Cases, num_users: int) -> tuple[Tensor, Tensor] | None:
        """`since_V` and the `[B]` times of the users' first targets; None where all items compete for these.

        A list is made once for each user, so it is made at the first time something is asked of it.
        """
        if self.since_V is None or not len(cases.time):
            return None
        time_B = torch.full((num_users,), NEVER)
        time_B.scatter_reduce_(0, cases.row, cases.time, "amin")
        return None if self.since_V.max() <= time_B.min() else (self.since_V, time_B)


def candidate_counts(
    folder: DataFolder, split: Part, users: NDArray[np.int64], rule: Rule
) -> int | NDArray[np.int64]:
    """How many items compete in each case `[C]` of `users`, or one number where all cases have the same;
    targets and seen items included.
    """
    since_V = Candidates.of(folder, rule).since_V
    if since_V is None:
        return folder.num_items
    times = target_times(folder, split, users)
    counts: NDArray[np.int64] = np.searchsorted(np.sort(since_V.numpy()[1:]), times, side="right")
    return counts
