"""Re-rankers: the first N items of another scorer in a new order.

The rank of a target:

* A target among the base scorer's first N items is ranked by the new scores among these.
* Any other target is ranked behind the N items by the base scorer's exact counts; items of equal base score
  that are among the N count as greater.
* A target that the base scorer ranks within N but does not list (a seen item, or one that is available at the
  target's time but not at the list's) replaces the last item of the list.

Ranks do not depend on how users are cut into blocks. If the base scorer only knows lists, ranks outside of
its list are unknown.

Shape letters: B users, C target cases, N items of the base list, E targets added to it.
"""

from __future__ import annotations

from abc import abstractmethod
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from findrec.evaluation.scoring.base import UNKNOWN, Query, Ranking, Scorer, Top


class ReRanker(Scorer):
    """Re-ranks the first `first` items (at least one) of the scorer `base`."""

    def __init__(self, base: Scorer, first: int, name: str) -> None:
        if first < 1:
            raise ValueError(f"first={first}: a re-ranker needs at least one item")
        self.base, self.name, self.list_limit = base, name, base.list_limit
        self.first = first if base.list_limit is None else min(first, base.list_limit)

    @abstractmethod
    def rescore(self, query: Query, ids_BN: Tensor) -> Tensor:
        """New scores `[B, N]` of some items (int64, 0: padding) of each user.

        The score of an item must not depend on the other items of its row. NaN counts as the lowest score.
        """

    def rank(self, query: Query) -> ReRanking:
        """See `Scorer`."""
        return ReRanking(self, query, self.base.rank(query))

    def block_size(self, users_per_block: int, num_items: int) -> int:
        """See `Scorer`: as the base scorer."""
        return self.base.block_size(users_per_block, num_items)


@dataclass(frozen=True)
class ReRanking:
    """The ranking of a query by new scores of the base scorer's first items."""

    scorer: ReRanker
    query: Query
    base: Ranking

    @cached_property
    def _listed(self) -> tuple[Tensor, Tensor]:
        """The base list `[B, N]` and its new scores."""
        ids_BN = self.base.top(self.scorer.first)[0]
        return ids_BN, self._rescored(ids_BN)

    def _rescored(self, ids_BN: Tensor) -> Tensor:
        scores_BN = self.scorer.rescore(self.query, ids_BN).double().cpu()
        return scores_BN.nan_to_num(nan=-torch.inf, posinf=torch.inf, neginf=-torch.inf)

    def counts(self) -> tuple[Tensor, Tensor]:
        """See `Ranking` and the module docstring."""
        cases = self.query.cases
        row_C, target_C = cases.row, cases.target
        greater_C, equal_C = (count.cpu() for count in self.base.counts())
        ids_BN, scores_BN = self._listed
        ids_CN, scores_CN = ids_BN[row_C], scores_BN[row_C]
        size_C = (ids_CN > 0).sum(1)
        listed_C = (ids_CN == target_C[:, None]).any(1)
        first = ids_BN.shape[1]
        added_C = ~listed_C & (greater_C != UNKNOWN) & (greater_C + equal_C < first)
        # An added target replaces the last item of a full list.
        last_CN = torch.arange(first) == first - 1
        rival_CN = (ids_CN > 0) & (ids_CN != target_C[:, None]) & ~(added_C[:, None] & last_CN)
        own_C = self._target_scores(listed_C | added_C)
        above_C = ((scores_CN > own_C[:, None]) & rival_CN).sum(1)
        level_C = ((scores_CN == own_C[:, None]) & rival_CN).sum(1)
        # Targets behind the list: listed items that are not greater by base score are equal.
        tied_C = torch.where(greater_C == UNKNOWN, 0, (size_C - greater_C).clamp(min=0))
        tied_C = torch.minimum(tied_C, equal_C)
        inside_C = listed_C | added_C
        return (
            torch.where(inside_C, above_C, greater_C + tied_C),
            torch.where(inside_C, level_C, equal_C - tied_C),
        )

    def _target_scores(self, inside_C: Tensor) -> Tensor:
        """New scores `[C]` of the targets in `inside_C`, with all targets of a row scored together."""
        row_C, target_C = self.query.cases.row, self.query.cases.target
        case_n = inside_C.nonzero()[:, 0]
        case_n = case_n[torch.argsort(row_C[case_n], stable=True)]
        row_n = row_C[case_n]
        size_B = torch.bincount(row_n, minlength=len(self.query.block.user))
        column_n = torch.arange(len(row_n)) - (size_B.cumsum(0) - size_B)[row_n]
        ids_BE = torch.zeros(len(size_B), int(size_B.max()) if len(size_B) else 0, dtype=torch.int64)
        ids_BE[row_n, column_n] = target_C[case_n]
        scores_C = torch.full(target_C.shape, -torch.inf, dtype=torch.float64)
        if len(case_n):
            scores_C[case_n] = self._rescored(ids_BE)[row_n, column_n]
        return scores_C

    def top(self, k: int) -> Top:
        """See `Ranking`: the first N items in the new order, then the next items of the base scorer.

        Ties stay in the base scorer's order. Scores of the two parts are not comparable.
        """
        ids_BN, scores_BN = self._listed
        scores_BN = scores_BN.masked_fill(ids_BN == 0, -torch.inf)
        # Two stable sorts: by score, then padding (whose score may be that of an item) last.
        order = scores_BN.sort(dim=1, descending=True, stable=True).indices
        order = order.gather(1, (ids_BN.gather(1, order) == 0).long().argsort(dim=1, stable=True))
        ids_BN, scores_BN = ids_BN.gather(1, order), scores_BN.gather(1, order)
        if k <= ids_BN.shape[1]:
            return ids_BN[:, :k], scores_BN[:, :k]
        ids_Bk, scores_Bk = self.base.top(k)
        rest = slice(ids_BN.shape[1], None)
        return torch.cat([ids_BN, ids_Bk[:, rest]], 1), torch.cat([scores_BN, scores_Bk[:, rest].double()], 1)
