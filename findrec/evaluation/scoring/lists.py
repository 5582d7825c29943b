"""Scorers that only generate lists, e.g. by beam search.

A target's rank is its position in the list; outside the list it is unknown. Metrics at k up to the length of
the lists are exact, others are not reported (`findrec.evaluation.metrics.metrics`).

Shape letters: B users, C target cases, n generated items.
"""

from __future__ import annotations

from abc import abstractmethod
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from findrec.evaluation.scoring.base import UNKNOWN, Query, Scorer, Top


class ListScorer(Scorer):
    """Base class of scorers that generate at most `list_limit` items per user."""

    list_limit: int

    @abstractmethod
    def generate(self, query: Query) -> Top:
        """Generate ids `[B, n]` (0: padding) and scores of items for each user, best first.

        The caller removes duplicates and items that do not compete (seen, unavailable); a scorer may apply
        the query's filters itself to fill the lists with other items.
        """

    def rank(self, query: Query) -> ListRanking:
        """See `Scorer`."""
        return ListRanking(self, query)


@dataclass(frozen=True)
class ListRanking:
    """The ranking of a query by generated lists."""

    scorer: ListScorer
    query: Query

    @cached_property
    def _lists(self) -> Top:
        ids_Bn, scores_Bn = (part.cpu() for part in self.scorer.generate(self.query))
        drop_Bn = (ids_Bn == 0) | _repeated(ids_Bn) | ~competes(self.query, ids_Bn)
        order = drop_Bn.long().argsort(dim=1, stable=True)[:, : self.scorer.list_limit]
        drop_Bn, scores_Bn = drop_Bn.gather(1, order), scores_Bn.gather(1, order)
        return ids_Bn.gather(1, order).masked_fill(drop_Bn, 0), scores_Bn.masked_fill(drop_Bn, -torch.inf)

    def counts(self) -> tuple[Tensor, Tensor]:
        """See `Ranking`: the target's position in the list, without ties."""
        cases = self.query.cases
        hit_Cn = self._lists[0][cases.row] == cases.target[:, None]
        if not hit_Cn.shape[1]:
            return torch.full_like(cases.target, UNKNOWN), torch.zeros_like(cases.target)
        greater_C = torch.where(hit_Cn.any(1), hit_Cn.long().argmax(1), UNKNOWN)
        return greater_C, torch.zeros_like(greater_C)

    def top(self, k: int) -> Top:
        """See `Ranking`; never more than `list_limit` items. Raises `ValueError` for a larger k."""
        if k > self.scorer.list_limit:
            raise ValueError(
                f"{self.scorer.name} generates lists of at most {self.scorer.list_limit} items, not {k}"
            )
        ids_Bn, scores_Bn = self._lists
        missing = max(0, k - ids_Bn.shape[1])
        pad = torch.nn.functional.pad
        return pad(ids_Bn, (0, missing))[:, :k], pad(scores_Bn, (0, missing), value=-torch.inf)[:, :k]


def competes(query: Query, ids_Bn: Tensor) -> Tensor:
    """Which items `[B, n]` may be listed for their user: neither seen nor unavailable."""
    allowed_Bn = torch.ones_like(ids_Bn, dtype=torch.bool)
    if query.seen_BM is not None and query.seen_BM.shape[1]:
        allowed_Bn &= ~(ids_Bn[:, :, None] == query.seen_BM[:, None, :]).any(2)
    if query.list_times is not None:
        allowed_Bn &= query.list_times.since_V[ids_Bn] <= query.list_times.time_B[:, None]
    return allowed_Bn


def _repeated(ids_Bn: Tensor) -> Tensor:
    """Which items `[B, n]` occur earlier in their row."""
    sorted_Bn, order_Bn = ids_Bn.sort(dim=1, stable=True)
    again_Bn = torch.zeros_like(ids_Bn, dtype=torch.bool)
    again_Bn[:, 1:] = sorted_Bn[:, 1:] == sorted_Bn[:, :-1]
    return torch.zeros_like(again_Bn).scatter_(1, order_Bn, again_Bn)
