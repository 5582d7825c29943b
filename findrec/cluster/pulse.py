"""Workers that hang: each says every second where it stands, the driver looks and names the one that hangs.

A worker that is lost Ray notices by itself. One that stands still (stopped, deadlocked, waiting for a dead
disk) it does not: the others wait for it in a collective until that times out, minutes later and without a
name. So every worker tells a small actor (`findrec.cluster.board`) of its progress; `find_hung` says who is
to blame. The answer to a worker's beat carries what the driver wants of it: to stop after the step under way.
"""

from __future__ import annotations

import os
import socket
import sys
import threading
import time
from collections.abc import Sequence
from typing import Any

from findrec.cluster.board import Seen, Sign
from findrec.training.worker import STARTING, TRAINING, Pulse

BEAT_S = 1.0
_SLOWER = 5.0  # times its longest piece of a step so far that a worker may take for the next one


def find_hung(seen: Sequence[Seen], *, hang_s: float, timeout_s: float) -> list[Seen]:
    """The workers that keep the others waiting; empty while all is well.

    A step may stand still for `hang_s`, or for some times its longest piece so far; what is done before the
    first step and between steps may take any time. A process that gives no sign at all is stopped or gone:
    it has `hang_s`, and `timeout_s` before its first step, when whole libraries are loaded.
    """
    silent = [s for s in seen if s.silent_s > (timeout_s if s.sign.doing == STARTING else hang_s)]
    if silent or not seen:
        return silent
    limits = [max(hang_s, _SLOWER * s.sign.longest_s) for s in seen]
    if any(s.sign.doing != TRAINING or s.still_s <= limit for s, limit in zip(seen, limits, strict=True)):
        return []
    working = [s for s in seen if not s.sign.waits]
    return working or list(seen)


class BeatingPulse(Pulse):
    """The pulse of a worker of a Ray job: a thread of its own tells the board."""

    def __init__(self, board: Any, rank: int, node: str) -> None:
        super().__init__()
        self._board, self._rank, self._node = board, rank, node
        self._watched = threading.get_ident()
        self._marked = time.monotonic()
        self._longest = 0.0
        threading.Thread(target=self._beat, name="findrec-pulse", daemon=True).start()

    def tick(self, step: int | None = None) -> None:
        """See `Pulse`."""
        now = time.monotonic()
        if self.doing == TRAINING and self.step > 1:  # the first steps compile and fill caches
            self._longest = max(self._longest, now - self._marked)
        super().tick(step)
        self._marked = now

    def _beat(self) -> None:
        import ray

        while True:
            waits, place = whereabouts(self._watched)
            sign = Sign(
                rank=self._rank,
                node=self._node,
                host=socket.gethostname(),
                pid=os.getpid(),
                doing=self.doing,
                step=self.step,
                ticks=self.ticks,
                longest_s=self._longest,
                waits=waits,
                place=place,
            )
            try:
                self.stop_asked = ray.get(self._board.beat.remote(sign), timeout=10 * BEAT_S)
            except Exception:  # the driver is gone, or slow: it will notice the silence
                time.sleep(BEAT_S)
            time.sleep(BEAT_S)


def whereabouts(thread: int) -> tuple[bool, str]:
    """Whether a thread of this process is inside a collective, and the innermost line of FindRec it is at."""
    frame = sys._current_frames().get(thread)
    waits, place = False, "?"
    while frame is not None:
        file = frame.f_code.co_filename
        waits = waits or "torch/distributed/" in file or "deepspeed/comm/" in file
        if "findrec" in file.split(os.sep):
            place = f"{'/'.join(file.split(os.sep)[-2:])}:{frame.f_lineno} ({frame.f_code.co_name})"
            break
        frame = frame.f_back
    return waits, place


def kill_worker(sign: Sign) -> None:
    """Kill a worker's process where it runs; Ray then knows that it is lost."""
    import ray
    from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

    there = NodeAffinitySchedulingStrategy(sign.node, soft=False)
    task = ray.remote(num_cpus=0, max_retries=0)(_kill).options(scheduling_strategy=there)
    ray.get(task.remote(sign.pid), timeout=60)


def _kill(pid: int) -> None:
    import signal

    os.kill(pid, signal.SIGKILL)
