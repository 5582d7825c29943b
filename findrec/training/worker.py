"""A worker of a training: its rank and device, its heartbeat, and the exchange of text between workers."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field

import torch
import torch.distributed as dist

from findrec.tables.collectives import COLLECTIVES
from findrec.tables.exchange import Shards

STARTING, TRAINING = "starting", "training"  # activities of a worker; work between steps has names of its own


class Heartbeat:
    """The progress a worker reports, watched from outside (see `findrec.cluster.heartbeat`)."""

    def __init__(self) -> None:
        self.step = 0
        self.ticks = 0
        self.doing = STARTING
        self.stop_requested = False  # finish the current step, save, and stop

    def tick(self, step: int | None = None) -> None:
        """Count a finished microbatch, or with `step` a finished step."""
        if step is not None:
            self.step, self.doing = step, TRAINING
        self.ticks += 1

    @contextmanager
    def busy(self, doing: str) -> Iterator[None]:
        """Report `doing` inside the context: work between steps that may take long, such as validating."""
        before, self.doing = self.doing, doing
        try:
            yield
        finally:
            self.doing = before
            self.ticks += 1


class StopRequested(Exception):  # noqa: N818 - not an error: the stop was requested
    """Training ends early: all workers have finished the step and tried to save it."""

    def __init__(self, step: int, *, saved: bool) -> None:
        super().__init__(f"step {step} is done and {'saved' if saved else 'could not be saved'}")


@dataclass(frozen=True)
class Worker:
    """The rank, world size, device and heartbeat of this process."""

    rank: int = 0
    world: int = 1
    device: torch.device = field(default_factory=lambda: torch.device("cpu"))
    heartbeat: Heartbeat = field(default_factory=Heartbeat)

    @property
    def is_rank_zero(self) -> bool:
        """Whether this worker prints, logs and saves."""
        return self.rank == 0


def share_text(text: str, device: torch.device) -> list[str]:
    """Gather a text from every worker, in rank order, without pickling.

    A collective call, unless there is no process group.
    """
    shards = Shards(0)
    own = torch.tensor(list(text.encode()), dtype=torch.uint8, device=device)
    (lengths,) = shards.lengths(len(own), device=device)
    texts = torch.split(shards.gather_uneven(own, lengths).cpu(), lengths)
    return [bytes(part.tolist()).decode() for part in texts]


def largest_of_workers(values: Sequence[float], worker: Worker, what: str) -> list[float]:
    """The largest of each value among all workers (a collective call); `what` they are, for messages."""
    if worker.world == 1:
        return list(values)
    largest = torch.tensor(values, dtype=torch.float64, device=worker.device)
    with COLLECTIVES.call(what):
        dist.all_reduce(largest, dist.ReduceOp.MAX)
    return [float(value) for value in largest.tolist()]
