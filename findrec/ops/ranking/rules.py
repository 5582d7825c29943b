"""What a ranking knows beside vectors: bonuses of single items, excluded items and times of availability.

Shape letters: B users, C cases (a user and a target), V items (ids 1..V), N items with a bonus of a user (or
excluded ones).
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Rules:
    """What changes single scores, and which items compete: of users `[B, ...]` and cases `[C]`."""

    own_ids_BN: Tensor | None = None  # int64 items whose score gets a bonus, 0-padded; of repeats the first
    own_bonus_BN: Tensor | None = None  # float32, that bonus
    exclude_ids_BN: Tensor | None = None  # int64 items that do not compete (the seen filter), 0-padded
    since_V: Tensor | None = None  # int64 [V + 1]: item v competes in the cases with time_C >= since_V[v]
    time_C: Tensor | None = None  # int64

    def check(self) -> None:
        """Raise `ValueError` for halves of pairs."""
        if (self.since_V is None) != (self.time_C is None):
            raise ValueError("since_V and time_C must be given together")
        if (self.own_ids_BN is None) != (self.own_bonus_BN is None):
            raise ValueError("own_ids_BN and own_bonus_BN must be given together")

    def to(self, device: torch.device) -> Rules:
        """The same on a device."""
        return Rules(*(None if part is None else part.to(device) for part in vars(self).values()))


ALL_COMPETE = Rules()
