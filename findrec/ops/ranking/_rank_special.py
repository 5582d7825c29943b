"""Own and excluded items of users, and items that are not on offer yet: what single pairs need in a ranking.

Shape letters: B users, V items (ids 1..V), C cases (a user and a target), N own items of a user, P pairs,
S special pairs (a user's own and excluded items).
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from findrec.ops.ranking.counting import Counts, find_keys, pair_keys
from findrec.ops.ranking.rules import Rules

PAIRS = 1 << 20  # (case, special item) pairs looked at together


@dataclass(frozen=True)
class Offer:
    """Which items compete in which cases: all of them, or those that are there at the case's time."""

    since_V: Tensor | None
    time_C: Tensor | None

    def has(self, item_P: Tensor, case_P: Tensor) -> Tensor:
        """`[P]` bool for pairs of an item and a case."""
        if self.since_V is None or self.time_C is None:
            return torch.ones_like(item_P, dtype=torch.bool)
        return self.since_V[item_P] <= self.time_C[case_P]

    def size(self, case_n: Tensor, num_items: int) -> Tensor:
        """`[n]` int64, how many of the items 1..V compete in some cases."""
        if self.since_V is None or self.time_C is None:
            return torch.full_like(case_n, num_items)
        return torch.searchsorted(self.since_V[1:].sort().values, self.time_C[case_n], right=True)


@dataclass(frozen=True)
class Specials:
    """Pairs of a user and an own or excluded item, ascending in `key = row * (V + 1) + item`."""

    key: Tensor  # [S] int64
    row: Tensor  # [S]
    item: Tensor  # [S]
    bonus: Tensor  # [S] float64, 0 for items that are only excluded
    counted: Tensor  # [S] bool, False for excluded items
    start: Tensor  # [B + 1] where each row's pairs begin

    @staticmethod
    def of(num_users: int, num_items: int, rules: Rules, device: torch.device) -> Specials:
        """From the 0-padded ids of `Rules`."""
        own_ids_BN, own_bonus_BN, exclude_ids_BN = rules.own_ids_BN, rules.own_bonus_BN, rules.exclude_ids_BN
        stride = num_items + 1
        none = torch.zeros(0, dtype=torch.int64, device=device)
        own, bonus = none, none.double()
        if own_ids_BN is not None and own_bonus_BN is not None:
            own, index = pair_keys(own_ids_BN, stride).sort(stable=True)
            bonus = own_bonus_BN[own_ids_BN > 0].double()[index]
            first = torch.ones_like(own, dtype=torch.bool)
            first[1:] = own[1:] != own[:-1]
            own, bonus = own[first], bonus[first]
        out = torch.unique(pair_keys(exclude_ids_BN, stride)) if exclude_ids_BN is not None else none
        key = torch.unique(torch.cat([own, out]))
        index, is_special = find_keys(own, key)
        row = key // stride
        return Specials(
            key=key,
            row=row,
            item=key % stride,
            bonus=torch.where(is_special, bonus[index], 0.0) if len(own) else torch.zeros_like(key).double(),
            counted=~find_keys(out, key)[1],
            start=torch.searchsorted(row, torch.arange(num_users + 1, device=device)),
        )

    def there(self, kept_S: Tensor) -> Specials:
        """Only some of them."""
        row = self.row[kept_S]
        rows = torch.arange(len(self.start), device=row.device)
        parts = (self.item[kept_S], self.bonus[kept_S], self.counted[kept_S])
        return Specials(self.key[kept_S], row, *parts, start=torch.searchsorted(row, rows))

    def pairs(self, row_C: Tensor) -> Iterator[tuple[Tensor, Tensor]]:
        """All pairs of a case and a special item of its row, as indices `[P]` into `row_C` and in these."""
        first_C, size_C = self.start[row_C], (self.start[1:] - self.start[:-1])[row_C]
        ends = size_C.cumsum(0)
        lo = 0
        while lo < len(row_C):
            before = int(ends[lo - 1]) if lo else 0
            hi = max(lo + 1, int(torch.searchsorted(ends, before + PAIRS, right=True)))
            size = size_C[lo:hi]
            case_P = torch.repeat_interleave(torch.arange(lo, hi, device=row_C.device), size)
            at_P = torch.arange(len(case_P), device=row_C.device)
            yield case_P, first_C[case_P] + at_P - (ends[lo:hi] - size - before)[case_P - lo]
            lo = hi

    def correct(
        self, base_S: Tensor, row_C: Tensor, target_C: Tensor, t_C: Tensor, offer: Offer, counts: Counts
    ) -> None:
        """Take these items, counted by their scores `base_S` without bonus, out; own ones back in with it."""
        final_S = base_S + self.bonus
        for case_P, s_P in self.pairs(row_C):
            base_P, final_P, t_P = base_S[s_P], final_S[s_P], t_C[case_P]
            counted_P = self.counted[s_P]
            item_P = self.item[s_P]
            rival_P = (item_P != target_C[case_P]) & offer.has(item_P, case_P)
            greater_P = ((final_P > t_P) & counted_P).long() - (base_P > t_P).long()
            equal_P = ((final_P == t_P) & counted_P).long() - (base_P == t_P).long()
            counts.greater.index_add_(0, case_P, greater_P * rival_P)
            counts.equal.index_add_(0, case_P, equal_P * rival_P)
