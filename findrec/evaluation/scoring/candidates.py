"""Candidate items: the full catalogue, the items available at the time of a target, or an allow-list.

Items that were removed from the catalogue (`DataFolder.gone`) or are not on the allow-list never compete.
With the rule `available`, the others compete for targets at their `DataFolder.available_from` and later (see
Ji et al., TOIS 2023, on the leakage otherwise). Only these times are stored: scorers mask the tiles they
score.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from findrec.datasets.batches.evaluation import Cases, Part, target_events
from findrec.datasets.folder.data_folder import ALWAYS, NEVER, DataFolder
from findrec.evaluation.scoring.allow_list import allowed_items

# "all", "available", a condition of `findrec.evaluation.scoring.allow_list`, or several of these
Rule = str | Sequence[str]


def allow_list_conditions(rule: Rule) -> list[str]:
    """The conditions of a rule's allow-list."""
    return [one for one in _entries(rule) if one not in ("all", "available")]


def uses_availability(rule: Rule) -> bool:
    """Whether items compete only from the time they are available."""
    return "available" in _entries(rule)


def describe_rule(rule: Rule) -> str:
    """Format the rule as one string."""
    return ", ".join(_entries(rule))


def _entries(rule: Rule) -> list[str]:
    return [rule] if isinstance(rule, str) else list(rule) or ["all"]


@dataclass(frozen=True)
class Candidates:
    """The times from which items compete, and the allow-list."""

    since_V: Tensor | None  # [V + 1] int64, seconds: item v competes from since_V[v]; None: all always do
    listed_V: Tensor | None = None  # [V + 1] bool, the allow-list, if any

    @staticmethod
    def of(folder: DataFolder, rule: Rule) -> Candidates:
        """The candidates of a data folder; raises `FindRecError` for an invalid allow-list."""
        listed = allowed_items(folder, conditions) if (conditions := allow_list_conditions(rule)) else None
        since_V = folder.available_from if uses_availability(rule) else np.full(folder.num_items + 1, ALWAYS)
        since_V = np.where(folder.gone if listed is None else folder.gone | ~listed, NEVER, since_V)
        since_V[0] = ALWAYS  # scorers exclude padding themselves
        return Candidates(
            None if (since_V == ALWAYS).all() else torch.from_numpy(since_V),
            None if listed is None else torch.from_numpy(listed),
        )

    def restricted(self, listed_V: Tensor) -> Candidates:
        """The candidates that are also on an allow-list `[V + 1]` of booleans."""
        since_V = torch.full((len(listed_V),), ALWAYS) if self.since_V is None else self.since_V
        both = listed_V if self.listed_V is None else listed_V & self.listed_V
        since_V = torch.where(listed_V, since_V, NEVER)
        since_V[0] = ALWAYS
        return Candidates(since_V, both)

    def list_times(self, cases: Cases, num_users: int) -> tuple[Tensor, Tensor] | None:
        """`since_V` and the times `[B]` of the users' lists; None if all items are available at these.

        A user has one list, made at the time of the first target.
        """
        if self.since_V is None or not len(cases.time):
            return None
        time_B = torch.full((num_users,), NEVER - 1)
        time_B.scatter_reduce_(0, cases.row, cases.time, "amin")
        return None if self.since_V.max() <= time_B.min() else (self.since_V, time_B)

    def with_listed_targets(self, cases: Cases) -> Cases:
        """The cases whose target is on the allow-list."""
        if self.listed_V is None:
            return cases
        listed_C = self.listed_V[cases.target]
        return Cases(cases.row[listed_C], cases.user[listed_C], cases.target[listed_C], cases.time[listed_C])

    def at(self, time: int, num_items: int) -> Tensor:
        """Which items `[V + 1]` are available at a time (seconds); False for padding."""
        if self.since_V is None:
            available_V = torch.ones(num_items + 1, dtype=torch.bool)
        else:
            available_V = self.since_V <= min(time, NEVER - 1)
        available_V[0] = False
        return available_V

    def sha256(self) -> str | None:
        """Hash of the allow-list; None without one."""
        if self.listed_V is None:
            return None
        return hashlib.sha256(np.packbits(self.listed_V.numpy()).tobytes()).hexdigest()


def candidate_counts(
    folder: DataFolder, split: Part, users: NDArray[np.int64], rule: Rule
) -> int | NDArray[np.int64]:
    """Number of candidates, including target and seen items.

    Returns one number per case `[C]` of `users` with a target on the allow-list, or a single number if it is
    the same for all cases.
    """
    candidates = Candidates.of(folder, rule)
    if candidates.since_V is None:
        return folder.num_items
    events = target_events(folder, split, users)
    listed_V = candidates.listed_V
    times = events.timestamp if listed_V is None else events.timestamp[listed_V[events.item]]
    counts: NDArray[np.int64] = np.searchsorted(np.sort(candidates.since_V.numpy()[1:]), times, side="right")
    return counts
