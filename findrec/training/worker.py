"""Who a process is among the workers of a training."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch


@dataclass(frozen=True)
class Worker:
    """Who this process is among the workers."""

    rank: int = 0
    world: int = 1
    device: torch.device = field(default_factory=lambda: torch.device("cpu"))

    @property
    def leads(self) -> bool:
        """Rank 0 prints, logs and saves."""
        return self.rank == 0
