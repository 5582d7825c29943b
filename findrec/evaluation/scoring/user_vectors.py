"""User vectors with bonuses of single items, and float32 lists of the items with the highest scores.

Shape letters: B users, K vectors of a user, V items, d width, N items with a bonus, M seen items.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from findrec.evaluation.scoring.base import Times, Top
from findrec.ops._tiles import tile_bytes
from findrec.ops.ranking.rules import Rules

_TILE_BYTES = 64 << 20  # of scores, on a CPU


@dataclass(frozen=True)
class UserVectors:
    """One or K vectors per user, and repeat-consumption bonuses, if any."""

    users_Bd: Tensor  # float32 [B, d], or [B, K, d]: the largest of the K products is the score
    own_ids_BN: Tensor | None = None  # int64, distinct recent items of each user, 0-padded
    own_bonus_BN: Tensor | None = None  # float32, added to their scores

    @property
    def device(self) -> torch.device:
        """Device of the vectors."""
        return self.users_Bd.device

    @property
    def is_plain(self) -> bool:
        """Whether the scores are inner products with a single vector, without bonuses."""
        return self.own_ids_BN is None and (self.users_Bd.dim() == 2 or self.users_Bd.shape[1] == 1)

    def single(self) -> Tensor:
        """The vectors as `[B, d]`; each user must have one."""
        return self.users_Bd if self.users_Bd.dim() == 2 else self.users_Bd.squeeze(1)

    def add_bonus(self, rules: Rules) -> Rules:
        """Add the bonuses to ranking rules."""
        return replace(rules, own_ids_BN=self.own_ids_BN, own_bonus_BN=self.own_bonus_BN)

    def times(self, signs_d: Tensor) -> UserVectors:
        """The vectors with each coordinate multiplied by +1 or -1."""
        return UserVectors(self.users_Bd * signs_d, self.own_ids_BN, self.own_bonus_BN)

    def to(self, device: torch.device | str) -> UserVectors:
        """Copy to a device."""
        own = (None if x is None else x.to(device) for x in (self.own_ids_BN, self.own_bonus_BN))
        return UserVectors(self.users_Bd.to(device), *own)

    def cpu(self) -> UserVectors:
        """Copy to the CPU."""
        return self.to("cpu")

    def rows(self, rows: Tensor | slice) -> UserVectors:
        """The vectors of some of the users."""
        own = (None if x is None else x[rows] for x in (self.own_ids_BN, self.own_bonus_BN))
        return UserVectors(self.users_Bd[rows], *own)


def top_items(
    users: UserVectors,
    items_Vd: Tensor,
    k: int,
    seen_BM: Tensor | None = None,
    times: Times | None = None,
) -> Top:
    """The first k <= V items by score, with bonuses, without seen and unavailable items.

    `users` and `items_Vd` must be on one device. NaN counts as the lowest score.
    """
    step = max(1, tile_bytes(items_Vd.device, _TILE_BYTES) // (4 * len(items_Vd)))
    if users.users_Bd.dim() == 3:
        step = max(1, step // users.users_Bd.shape[1])
    parts = []
    for lo in range(0, len(users.users_Bd), step):
        part = slice(lo, lo + step)
        scores_bV = users.users_Bd[part] @ items_Vd.T
        if scores_bV.dim() == 3:
            scores_bV = scores_bV.amax(1)
        if users.own_ids_BN is not None and users.own_bonus_BN is not None:
            bonus = users.own_bonus_BN[part].to(scores_bV.dtype)
            scores_bV.scatter_add_(1, users.own_ids_BN[part], bonus)
        if seen_BM is not None:
            scores_bV.scatter_(1, seen_BM[part].to(scores_bV.device), -torch.inf)
        if times is not None:
            part_times = times.rows(part).to(scores_bV.device)
            scores_bV.masked_fill_(part_times.since_V > part_times.time_B[:, None], -torch.inf)
        scores_bV[:, 0] = -torch.inf
        best = scores_bV.nan_to_num_(nan=-torch.inf, neginf=-torch.inf, posinf=torch.inf).topk(k)
        ids = torch.where(best.values == -torch.inf, 0, best.indices)
        parts.append((ids.cpu(), best.values.cpu()))
    return torch.cat([ids for ids, _ in parts]), torch.cat([scores for _, scores in parts])
