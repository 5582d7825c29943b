"""Detects hung workers: each worker reports its progress every second, and the driver checks the reports.

Ray detects workers whose process has died, but not workers that hang (stopped, deadlocked, waiting for a dead
disk). The others then wait in a collective until it times out, minutes later and without naming the cause. So
every worker reports its progress to an actor (`findrec.cluster.heartbeat_registry`), and `find_hung` names
the workers that block the others. The reply to a heartbeat tells the worker whether to stop after the current
step.

With gloo a worker that waits for others is inside of a collective call. With NCCL it is wherever the host
first needs a result from the GPU (`tolist`, `item`), so workers also count the collective calls they enter
(`findrec.tables.collectives`): those that others wait for have entered fewer.
"""

from __future__ import annotations

import os
import socket
import sys
import threading
import time
from collections.abc import Sequence
from typing import Any

from findrec.cluster.heartbeat_registry import ObservedStatus, WorkerStatus
from findrec.tables.collectives import COLLECTIVES
from findrec.training.worker import STARTING, TRAINING, Heartbeat

BEAT_S = 1.0
_SLOWER = 5.0  # a microbatch may take this many times the longest one so far


def find_hung(statuses: Sequence[ObservedStatus], *, hang_s: float, timeout_s: float) -> list[ObservedStatus]:
    """The workers that block the others; empty if none hangs.

    While training, a worker may make no progress for `hang_s` seconds, or for five times its longest
    microbatch so far if that is longer; work before the first step and between steps is not limited. A
    process that sends no heartbeat for `hang_s` seconds hangs whatever it does; before its first step, while
    it loads libraries, the limit is `timeout_s`.

    Of workers that make no progress, those inside of a collective call wait for the others. Where calls are
    asynchronous, those that have entered the fewest are waited for.
    """
    silent = [s for s in statuses if s.silent_s > (timeout_s if s.status.doing == STARTING else hang_s)]
    if silent or not statuses:
        return silent
    limits = [max(hang_s, _SLOWER * s.status.longest_s) for s in statuses]
    if any(
        s.status.doing != TRAINING or s.still_s <= limit for s, limit in zip(statuses, limits, strict=True)
    ):
        return []
    suspects = list(statuses)
    if any(s.status.asynchronous for s in statuses):
        fewest = min(s.status.collectives for s in statuses)
        suspects = [s for s in statuses if s.status.collectives == fewest]
    return [s for s in suspects if not s.status.waits] or suspects


def describe_hang(hung: Sequence[ObservedStatus], statuses: Sequence[ObservedStatus]) -> str:
    """Say where the workers that `find_hung` returned are, and where the others wait for them on GPUs."""
    still_s = max(max(s.silent_s, s.still_s) for s in hung)
    text = f"{'; '.join(str(s.status) for s in hung)}: no progress for {still_s:.0f} s"
    ranks = {s.status.rank for s in hung}
    waiting = {
        s.status.collective: None
        for s in statuses
        if s.status.asynchronous and s.status.collective and s.status.rank not in ranks
    }
    if waiting:
        text += f", while the others wait in: {', '.join(waiting)}"
    return text


class ReportingHeartbeat(Heartbeat):
    """The heartbeat of a worker of a Ray job; a background thread sends it to the registry."""

    def __init__(self, registry: Any, rank: int, node: str, *, asynchronous: bool = False) -> None:
        """`asynchronous` says whether collective calls return before they are done, as on a GPU."""
        super().__init__()
        self._registry, self._rank, self._node = registry, rank, node
        self._asynchronous = asynchronous
        self._training_thread = threading.get_ident()
        self._last_tick = time.monotonic()
        self._longest = 0.0
        threading.Thread(target=self._beat, name="findrec-heartbeat", daemon=True).start()

    def tick(self, step: int | None = None) -> None:
        """See `Heartbeat`."""
        now = time.monotonic()
        if self.doing == TRAINING and self.step > 1:  # the first steps compile and fill caches
            self._longest = max(self._longest, now - self._last_tick)
        super().tick(step)
        self._last_tick = now

    def status(self) -> WorkerStatus:
        """The progress of the training thread."""
        waits, line = thread_position(self._training_thread)
        return WorkerStatus(
            rank=self._rank,
            node=self._node,
            host=socket.gethostname(),
            pid=os.getpid(),
            doing=self.doing,
            step=self.step,
            ticks=self.ticks,
            longest_s=self._longest,
            waits=waits,
            line=line,
            asynchronous=self._asynchronous,
            collectives=COLLECTIVES.entered,
            collective=COLLECTIVES.last,
        )

    def _beat(self) -> None:
        import ray

        while True:
            status = self.status()
            try:
                self.stop_requested = ray.get(self._registry.beat.remote(status), timeout=10 * BEAT_S)
            except Exception:  # the driver is gone or slow; it detects missing heartbeats itself
                time.sleep(BEAT_S)
            time.sleep(BEAT_S)


def thread_position(thread: int) -> tuple[bool, str]:
    """Whether a thread of this process is in a collective, and the innermost line of FindRec it executes."""
    frame = sys._current_frames().get(thread)
    waits, line = False, "?"
    while frame is not None:
        file = frame.f_code.co_filename
        waits = waits or "torch/distributed/" in file or "deepspeed/comm/" in file
        if "findrec" in file.split(os.sep):
            line = f"{'/'.join(file.split(os.sep)[-2:])}:{frame.f_lineno} ({frame.f_code.co_name})"
            break
        frame = frame.f_back
    return waits, line


def kill_worker(status: WorkerStatus) -> None:
    """Kill a worker's process on its machine; Ray then detects the loss."""
    import ray
    from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

    on_its_node = NodeAffinitySchedulingStrategy(status.node, soft=False)
    task = ray.remote(num_cpus=0, max_retries=0)(_kill).options(scheduling_strategy=on_its_node)
    ray.get(task.remote(status.pid), timeout=60)


def _kill(pid: int) -> None:
    import signal

    os.kill(pid, signal.SIGKILL)
