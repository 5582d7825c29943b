"""The scorer interface: a `Scorer` takes a `Query` and returns a `Ranking`.

A query is a block of users with the filters that decide which items compete. A ranking provides counts of
items with a higher or equal score than each target, and the first k items of each user. Scorers compute inner
products (`inner_product.py`), scores of ranges of items (`blocks.py`), a new order of another scorer's list
(`rerank.py`) or lists only (`lists.py`).

Shape letters: B users, C target cases, V items (ids 1..V), M seen items of a user, k items of a list.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Protocol

import torch
from torch import Tensor

from findrec.datasets.batches.evaluation import Cases
from findrec.evaluation.scoring.candidates import Candidates
from findrec.evaluation.scoring.users import UserBlock
from findrec.ops.ranking.rules import Rules

UNKNOWN = -1  # value of `greater` if the target's rank is unknown

Top = tuple[Tensor, Tensor]  # item ids [B, k] int64 (0: padding) and their scores [B, k], on the CPU


@dataclass(frozen=True)
class Times:
    """Times from which items are available, and times of the users' lists."""

    since_V: Tensor  # [V + 1] int64, s
    time_B: Tensor  # [B] int64, s

    def to(self, device: torch.device) -> Times:
        """Copy to a device."""
        return Times(self.since_V.to(device), self.time_B.to(device))

    def rows(self, rows: Tensor | slice) -> Times:
        """The times of some of the users."""
        return Times(self.since_V, self.time_B[rows])


@dataclass(frozen=True)
class Query:
    """A block of users, the target cases to rank, and the items that compete."""

    block: UserBlock
    cases: Cases  # cases of the block whose target is on the allow-list
    seen_BM: Tensor | None = None  # int64, distinct items of each history, 0-padded: excluded
    since_V: Tensor | None = None  # [V + 1]: item v competes in cases at time since_V[v] and later
    list_times: Times | None = None  # availability of items in lists; None: all are available

    @staticmethod
    def of(block: UserBlock, candidates: Candidates, *, mask_seen: bool) -> Query:
        """The query of a block; `mask_seen` excludes the items of a user's history, except targets."""
        times = candidates.list_times(block.cases, len(block.user))
        return Query(
            block,
            candidates.with_listed_targets(block.cases),
            block.padded_items() if mask_seen else None,
            candidates.since_V,
            None if times is None else Times(*times),
        )

    def shortened(self, length: int) -> Query:
        """The query with histories cut to their last `length` events; filters are unchanged."""
        return replace(self, block=self.block.shortened(length))

    @property
    def rules(self) -> Rules:
        """The filters of the target cases."""
        times = None if self.since_V is None else self.cases.time
        return Rules(exclude_ids_BN=self.seen_BM, since_V=self.since_V, time_C=times)


class Ranking(Protocol):
    """The ranking of the items for one query."""

    def counts(self) -> tuple[Tensor, Tensor]:
        """Numbers of other items with a higher and with an equal score than each target, int64 `[C]` each.

        The first is `UNKNOWN` if the target's rank is unknown (`Scorer.list_limit`).
        """

    def top(self, k: int) -> Top:
        """The first min(k, V) items of each user, best first."""


class Scorer(ABC):
    """Base class of everything that ranks items for users."""

    name: str  # in result rows
    list_limit: int | None = None  # ranks are known only up to this one; None: all ranks are known
    # Of a model's scorer: whether its second argument is the rows of all tables by name, not of items only.
    reads_all_tables = False

    @abstractmethod
    def rank(self, query: Query) -> Ranking:
        """Rank the items for a query."""

    def block_size(self, users_per_block: int, num_items: int) -> int:
        """Maximum number of users of a block, given the configured `users_per_block`."""
        return users_per_block

    def with_short_histories(self, length: int) -> Scorer:
        """The scorer restricted to the last `length` events of each history; filters use all events."""
        return _ShortHistories(self, length)

    @contextmanager
    def distributed(self, folder: Path | None, shards: int) -> Iterator[Scorer]:
        """The scorer with its item vectors, if any, distributed over `shards` Ray workers (0: unchanged).

        Vectors are passed to the workers through a file in `folder`.
        """
        yield self


class _ShortHistories(Scorer):
    def __init__(self, scorer: Scorer, length: int) -> None:
        self.name, self.list_limit = scorer.name, scorer.list_limit
        self._scorer, self._length = scorer, length

    def rank(self, query: Query) -> Ranking:
        return self._scorer.rank(query.shortened(self._length))

    def block_size(self, users_per_block: int, num_items: int) -> int:
        return self._scorer.block_size(users_per_block, num_items)
