"""Who a process is among the workers of a training, what they tell each other, and how one is watched and
asked to stop.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

import torch

from findrec.tables.exchange import Shards

STARTING, TRAINING = "starting", "training"  # what a worker does; other words for what takes its own time


class Pulse:
    """What a worker shows of its progress, for somebody to watch from outside (`findrec.cluster.pulse`)."""

    def __init__(self) -> None:
        self.step = 0
        self.ticks = 0
        self.doing = STARTING
        self.stop_asked = False  # finish the step, save, end

    def tick(self, step: int | None = None) -> None:
        """One more piece of a step is done, or with `step` a whole one."""
        if step is not None:
            self.step, self.doing = step, TRAINING
        self.ticks += 1

    @contextmanager
    def busy(self, doing: str) -> Iterator[None]:
        """Something between steps that may take long, such as validating."""
        before, self.doing = self.doing, doing
        try:
            yield
        finally:
            self.doing = before
            self.ticks += 1


class StopRequested(Exception):  # noqa: N818 - no error: training ends early because somebody asked for it
    """All workers have finished the step and saved it, if it could be."""

    def __init__(self, step: int, *, saved: bool) -> None:
        super().__init__(f"step {step} is done and {'saved' if saved else 'could not be saved'}")


@dataclass(frozen=True)
class Worker:
    """Who this process is among the workers."""

    rank: int = 0
    world: int = 1
    device: torch.device = field(default_factory=lambda: torch.device("cpu"))
    pulse: Pulse = field(default_factory=Pulse)

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
