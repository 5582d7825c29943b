"""Which items compete for which target, and may be shown: all of the catalogue, those that were on offer at
the time, those of an allow-list.

An item that is gone from the catalogue (`DataFolder.gone`) or not on the list never competes; by the rule
`available` the others compete for the targets of their `DataFolder.available_from` and later, whatever their
ids (Ji et al., TOIS 2023, on what ranking items before their time does to results). Nothing but these times
is held: the rankers mask the tiles they score.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from findrec.datasets.batches import Cases, Part, target_events
from findrec.datasets.folder import ALWAYS, NEVER, DataFolder
from findrec.evaluation.allow import allowed_items

# "all", "available" (by the items' times), a condition of `findrec.evaluation.allow`, or several of these
Rule = str | Sequence[str]


def conditions_of(rule: Rule) -> list[str]:
    """The allow-list's part of a rule."""
    return [one for one in _entries(rule) if one not in ("all", "available")]


def goes_by_time(rule: Rule) -> bool:
    """Whether items compete only from the time they are available."""
    return "available" in _entries(rule)


def describe_rule(rule: Rule) -> str:
    """The rule as one string."""
    return ", ".join(_entries(rule))


def _entries(rule: Rule) -> list[str]:
    return [rule] if isinstance(rule, str) else list(rule) or ["all"]


@dataclass(frozen=True)
class Candidates:
    """Item v competes for targets of the time `since_V[v]` (`[V + 1]` int64, s) and later."""

    since_V: Tensor | None  # None: all items always compete
    listed_V: Tensor | None = None  # [V + 1] bool, the allow-list; None: there is none

    @staticmethod
    def of(folder: DataFolder, rule: Rule) -> Candidates:
        """The candidates of a data folder; raises `FindRecError` for an allow-list that cannot be made."""
        listed = allowed_items(folder, conditions) if (conditions := conditions_of(rule)) else None
        since_V = folder.available_from if goes_by_time(rule) else np.full(folder.num_items + 1, ALWAYS)
        since_V = np.where(folder.gone if listed is None else folder.gone | ~listed, NEVER, since_V)
        since_V[0] = ALWAYS  # padding is left out by the rankers themselves
        return Candidates(
            None if (since_V == ALWAYS).all() else torch.from_numpy(since_V),
            None if listed is None else torch.from_numpy(listed),
        )

    def late(self, cases: Cases, num_users: int) -> tuple[Tensor, Tensor] | None:
        """`since_V` and the `[B]` times of the users' first targets; None where all items compete for these.

        A list is made once for each user, so it is made at the first time something is asked of it.
        """
        if self.since_V is None or not len(cases.time):
            return None
        time_B = torch.full((num_users,), NEVER - 1)
        time_B.scatter_reduce_(0, cases.row, cases.time, "amin")
        return None if self.since_V.max() <= time_B.min() else (self.since_V, time_B)

    def asked(self, cases: Cases) -> Cases:
        """The cases that can be answered: those whose target is on the allow-list."""
        if self.listed_V is None:
            return cases
        on_C = self.listed_V[cases.target]
        return Cases(cases.row[on_C], cases.user[on_C], cases.target[on_C], cases.time[on_C])

    def at(self, time: int, num_items: int) -> Tensor:
        """`[V + 1]` bool: the items that may be shown at a time (s), padding not."""
        if self.since_V is None:
            shown_V = torch.ones(num_items + 1, dtype=torch.bool)
        else:
            shown_V = self.since_V <= min(time, NEVER - 1)
        shown_V[0] = False
        return shown_V

    def sha256(self) -> str | None:
        """Which items the allow-list names; None where there is none."""
        if self.listed_V is None:
            return None
        return hashlib.sha256(np.packbits(self.listed_V.numpy()).tobytes()).hexdigest()


def candidate_counts(
    folder: DataFolder, split: Part, users: NDArray[np.int64], rule: Rule
) -> int | NDArray[np.int64]:
    """How many items compete in each case `[C]` of `users` (those with a target on the allow-list), or one
    number where all cases have the same; targets and seen items included.
    """
    offer = Candidates.of(folder, rule)
    if offer.since_V is None:
        return folder.num_items
    events = target_events(folder, split, users)
    times = events.timestamp if offer.listed_V is None else events.timestamp[offer.listed_V[events.item]]
    counts: NDArray[np.int64] = np.searchsorted(np.sort(offer.since_V.numpy()[1:]), times, side="right")
    return counts
