"""The driver's side of the evaluator beside training: place it, ask it for pieces of work, replace it.

It gets a GPU where the cluster has one more than the workers need, and shares the driver's machine with
whoever is there, at low priority, where it has not. It never takes a place that a worker could have.
"""

from __future__ import annotations

import threading
import time
from pathlib import Path
from typing import Any

import torch

from findrec.cluster.evaluator import Evaluator
from findrec.cluster.machines import cluster_machines, has_gpus
from findrec.config import RunConfig
from findrec.errors import Preempted, find_mistake
from findrec.evaluation.evaluate import Rows
from findrec.evaluation.run import print_table
from findrec.progress import say

_PAUSE_S = 2.0  # after the evaluator has found nothing to do
_LOSSES = 3  # of the actor, without a piece of work done in between


class Beside:
    """The evaluator of one run, for as long as the driver lives; idle until it is looked at."""

    def __init__(self, config: RunConfig, data_folder: str, run_folder: Path) -> None:
        """Places nothing yet."""
        self._config = config
        self._given = (
            config.model_dump(mode="json"),
            data_folder,
            str(run_folder),
            torch.get_num_threads(),
        )
        self._training = True
        self._actor: Any = None
        self._on_gpu = False
        self._piece: Any = None  # of work that is under way
        self._idle_since: float | None = None
        self._losses = 0

    def look(self) -> None:
        """Take what the evaluator has done and give it more; returns at once. Call it every second or so."""
        import ray

        if self._piece is not None:
            done, _ = ray.wait([self._piece], timeout=0)
            if not done:
                return
            self._take()
        if self._losses < _LOSSES and (
            self._idle_since is None or time.monotonic() - self._idle_since > _PAUSE_S
        ):
            self._piece = self._evaluator().work.remote()

    def pause(self) -> None:
        """Give back what the evaluator holds: the workers are about to be placed anew."""
        import ray

        if self._actor is not None:
            ray.kill(self._actor)
        self._actor = self._piece = None

    def finish(self, stop: threading.Event) -> None:
        """After training: do all that is left, and evaluate the run. Raises `Preempted` when told to stop."""
        self._training, self._idle_since = False, None
        if not self._on_gpu and self._spare_gpu():
            self.pause()  # the workers' GPUs are free now
        while self._losses < _LOSSES:
            self.look()
            if self._piece is None or self._idle_since is not None:
                break
            self._wait(self._piece, stop)
        rows = self._last(stop)
        if rows is None:
            say("this process does what is left of the evaluator's work")
            here = Evaluator(*self._given, gpu=True)
            while here.work():
                continue
            rows = here.finish()
        print_table(rows)

    def _last(self, stop: threading.Event) -> Rows | None:
        """The results by the actor; None where it was lost."""
        import ray
        from ray.exceptions import RayActorError, RayTaskError

        if self._losses >= _LOSSES:
            return None
        answer = self._evaluator().finish.remote()
        self._wait(answer, stop)
        try:
            rows: Rows = ray.get(answer)
        except (RayActorError, RayTaskError) as error:
            _raise_mistake(error)
            say(f"WARNING: the evaluator was lost ({_last_line(error)})")
            return None
        finally:
            self.pause()
        return rows

    def _wait(self, answer: Any, stop: threading.Event) -> None:
        import ray

        while not ray.wait([answer], timeout=1.0)[0]:
            if stop.is_set():
                self.pause()
                raise Preempted("training is done, the evaluation was cut short")

    def _take(self) -> None:
        import ray
        from ray.exceptions import RayActorError, RayTaskError

        piece, self._piece = self._piece, None
        try:
            busy = ray.get(piece)
        except (RayActorError, RayTaskError) as error:
            _raise_mistake(error)
            self.pause()
            self._losses += 1
            again = "placing it again" if self._losses < _LOSSES else "its work is done after training"
            say(f"WARNING: the evaluator was lost ({_last_line(error)}): {again}")
            return
        self._losses = 0
        self._idle_since = None if busy else time.monotonic()

    def _evaluator(self) -> Any:
        import ray
        from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

        if self._actor is None:
            self._on_gpu = self._spare_gpu()
            here = NodeAffinitySchedulingStrategy(ray.get_runtime_context().get_node_id(), soft=False)
            place: dict[str, Any] = {"num_gpus": 1} if self._on_gpu else {"scheduling_strategy": here}
            remote = ray.remote(num_cpus=0, **place)(Evaluator)
            self._actor = remote.remote(*self._given, gpu=self._on_gpu)
            if not self._on_gpu:
                self._actor.yield_to_others.remote()
        return self._actor

    def _spare_gpu(self) -> bool:
        """Whether the cluster has a GPU that no worker needs."""
        import ray

        if self._config.cluster.gpu is False:
            return False
        taken = self._training and has_gpus(self._config, cluster_machines())
        gpus = ray.cluster_resources().get("GPU", 0)
        return bool(gpus - (self._config.cluster.workers if taken else 0) >= 1)


def _raise_mistake(error: Exception) -> None:
    if (mistake := find_mistake(error)) is not None:
        raise mistake from error


def _last_line(error: Exception) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[-1][:200]
