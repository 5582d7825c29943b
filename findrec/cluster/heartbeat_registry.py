"""The actor that collects the heartbeats of workers. It does not import torch, which takes seconds."""

from __future__ import annotations

import time
from dataclasses import dataclass

# Keys of the result of `findrec.cluster.worker.train_worker` when training did not run to its end.
RESULT_ERROR, RESULT_STOPPED = "error", "stopped"


@dataclass(frozen=True)
class WorkerStatus:
    """One heartbeat: the progress that a worker reports."""

    rank: int
    node: str  # Ray's node id
    host: str
    pid: int
    doing: str
    step: int
    ticks: int
    longest_s: float  # longest time between two ticks while training
    waits: bool  # whether it waits for other workers in a collective
    line: str  # the innermost line of FindRec being executed
    asynchronous: bool = False  # whether collective calls return before they are done, as on a GPU
    collectives: int = 0  # number of collective calls entered
    collective: str = ""  # the last of them

    def __str__(self) -> str:
        progress = f"{self.doing}, step {self.step}, at {self.line}"
        return f"rank {self.rank} (process {self.pid} on {self.host}), {progress}"


@dataclass(frozen=True)
class ObservedStatus:
    """The last status of a worker, with its age and the time since it changed."""

    status: WorkerStatus
    silent_s: float  # seconds since the last heartbeat
    still_s: float  # seconds since the last progress


class HeartbeatRegistry:
    """Keeps the last heartbeat of each worker of a group; runs as a Ray actor."""

    def __init__(self) -> None:
        self._statuses: dict[int, tuple[WorkerStatus, float, float]] = {}
        self._stop = False

    def beat(self, status: WorkerStatus) -> bool:
        """Record a heartbeat; returns whether workers should stop."""
        now = time.monotonic()
        previous = self._statuses.get(status.rank)
        progressed = now
        if previous is not None and (previous[0].ticks, previous[0].doing) == (status.ticks, status.doing):
            progressed = previous[2]
        self._statuses[status.rank] = (status, now, progressed)
        return self._stop

    def request_stop(self) -> None:
        """Ask all workers to finish their step, save and stop."""
        self._stop = True

    def statuses(self) -> list[ObservedStatus]:
        """The last status of every worker, by rank."""
        now = time.monotonic()
        return [
            ObservedStatus(status, now - received, now - progressed)
            for _, (status, received, progressed) in sorted(self._statuses.items())
        ]
