"""Runs the evaluator of `evaluation.evaluator=async` from the driver: places it, gives it work, replaces it.

The evaluator gets a GPU if the cluster has one that no worker needs. Otherwise it runs on the driver's
machine at low priority. It never takes resources that a worker could use.
"""

from __future__ import annotations

import threading
import time
from pathlib import Path
from typing import Any

import torch

from findrec.cluster.evaluator import Evaluator
from findrec.cluster.plan.machines import built_for_gpus, cluster_machines, use_gpus
from findrec.config import RunConfig
from findrec.errors import Preempted, unwrap_user_error
from findrec.evaluation.ranking.evaluate import Rows
from findrec.evaluation.run import print_table
from findrec.progress import say, warn

_IDLE_S = 2.0  # pause after the evaluator had nothing to do
_MAX_LOSSES = 3  # of the actor, without a completed task in between


class AsyncEvaluation:
    """The evaluator of one run. It works only while the driver calls `poll` or `finish`."""

    def __init__(self, config: RunConfig, data_folder: str, run_folder: Path) -> None:
        """Prepare the evaluator; the actor is placed by the first `poll`."""
        self._config = config
        self._evaluator_arguments = (
            config.model_dump(mode="json"),
            data_folder,
            str(run_folder),
            torch.get_num_threads(),
        )
        self._training = True
        self._actor: Any = None
        self._on_gpu = False
        self._task: Any = None  # the running call of `Evaluator.work`
        self._idle_since: float | None = None
        self._losses = 0

    def poll(self) -> None:
        """Collect a finished task and start the next one; returns at once. Call it about every second."""
        import ray

        if self._task is not None:
            done, _ = ray.wait([self._task], timeout=0)
            if not done:
                return
            self._collect()
        if self._losses < _MAX_LOSSES and (
            self._idle_since is None or time.monotonic() - self._idle_since > _IDLE_S
        ):
            self._task = self._evaluator().work.remote()

    def pause(self) -> None:
        """Kill the actor to release its resources, before workers are placed again."""
        import ray

        if self._actor is not None:
            ray.kill(self._actor)
        self._actor = self._task = None

    def finish(self, stop: threading.Event) -> None:
        """After training: do the remaining work and evaluate the run. Raises `Preempted` if `stop` is set."""
        self._training, self._idle_since = False, None
        if not self._on_gpu and self._has_unused_gpu():
            self.pause()  # to be placed on a GPU of the workers, which are free now
        while self._losses < _MAX_LOSSES:
            self.poll()
            if self._task is None or self._idle_since is not None:
                break
            self._wait(self._task, stop)
        rows = self._final_rows(stop)
        if rows is None:
            say("this process does what is left of the evaluator's work")
            local = Evaluator(*self._evaluator_arguments, gpu=True)
            while local.work():
                continue
            rows = local.finish()
        print_table(rows)

    def _final_rows(self, stop: threading.Event) -> Rows | None:
        """The metrics rows computed by the actor; None if it was lost."""
        import ray
        from ray.exceptions import RayActorError, RayTaskError

        if self._losses >= _MAX_LOSSES:
            return None
        answer = self._evaluator().finish.remote()
        self._wait(answer, stop)
        try:
            rows: Rows = ray.get(answer)
        except (RayActorError, RayTaskError) as error:
            _raise_user_error(error)
            warn(f"WARNING: the evaluator was lost ({_last_line(error)})")
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

    def _collect(self) -> None:
        import ray
        from ray.exceptions import RayActorError, RayTaskError

        task, self._task = self._task, None
        try:
            busy = ray.get(task)
        except (RayActorError, RayTaskError) as error:
            _raise_user_error(error)
            self.pause()
            self._losses += 1
            consequence = (
                "placing it again" if self._losses < _MAX_LOSSES else "its work is done after training"
            )
            warn(f"WARNING: the evaluator was lost ({_last_line(error)}): {consequence}")
            return
        self._losses = 0
        self._idle_since = None if busy else time.monotonic()

    def _evaluator(self) -> Any:
        import ray
        from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

        if self._actor is None:
            self._on_gpu = self._has_unused_gpu()
            this_node = NodeAffinitySchedulingStrategy(ray.get_runtime_context().get_node_id(), soft=False)
            options: dict[str, Any] = {"num_gpus": 1} if self._on_gpu else {"scheduling_strategy": this_node}
            remote = ray.remote(num_cpus=0, **options)(Evaluator)
            self._actor = remote.remote(*self._evaluator_arguments, gpu=self._on_gpu)
            if not self._on_gpu:
                self._actor.yield_to_others.remote()
        return self._actor

    def _has_unused_gpu(self) -> bool:
        """Whether the cluster has a GPU that no worker needs."""
        import ray

        if self._config.cluster.gpu is False or not built_for_gpus():
            return False
        placed, workers_use_gpus = use_gpus(self._config, cluster_machines())
        used = placed.cluster.workers if workers_use_gpus and self._training else 0
        return bool(ray.cluster_resources().get("GPU", 0) - used >= 1)


def _raise_user_error(error: Exception) -> None:
    if (user_error := unwrap_user_error(error)) is not None:
        raise user_error from error


def _last_line(error: Exception) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[-1][:200]
