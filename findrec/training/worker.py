"""Who a process is among the workers of a training, and what they tell each other."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch

from findrec.tables.exchange import Shards


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


def share_text(text: str, device: torch.device) -> list[str]:
    """What each worker says, in rank order (collective, unless there is no process group); unpickled."""
    shards = Shards(0)
    own = torch.tensor(list(text.encode()), dtype=torch.uint8, device=device)
    (lengths,) = shards.lengths(len(own), device=device)
    said = torch.split(shards.gather_uneven(own, lengths).cpu(), lengths)
    return [bytes(part.tolist()).decode() for part in said]
