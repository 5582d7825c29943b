"""Supervises a distributed training on the driver: places, watches, restarts and stops the workers.

Ray Train runs one group of workers at a time. Failures are handled here instead of in Ray Train because the
number of workers must divide the microbatches of a step, a stop must wait for a checkpoint, and errors in the
data must not be retried. The workers receive plain values only; checkpoints are files.
"""

from __future__ import annotations

import sys
import threading
import time
from collections.abc import Mapping, Sequence
from concurrent.futures import Future
from concurrent.futures import TimeoutError as StillRunning
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from findrec.cluster.heartbeat import describe_hang, find_hung, kill_worker
from findrec.cluster.heartbeat_registry import RESULT_ERROR, RESULT_STOPPED, HeartbeatRegistry, ObservedStatus
from findrec.cluster.plan.machines import Machine, cluster_machines, place_workers, use_gpus
from findrec.cluster.plan.placement import (
    draining_machines,
    fitting_workers,
    min_workers,
    shareable,
    wait_for_room,
    worker_resources,
)
from findrec.config import RunConfig
from findrec.errors import DivergedError, FindRecError, Preempted, system_error, unwrap_user_error
from findrec.progress import say, warn
from findrec.ray_session import worker_threads
from findrec.training.checkpoints.checkpoint import checkpoint_folder, latest_checkpoint, list_checkpoints
from findrec.training.logs.tracking import refuse_split_tracking
from findrec.training.runs import training_jobs

if TYPE_CHECKING:
    from findrec.cluster.async_evaluation import AsyncEvaluation  # imports modules that no worker needs


_POLL_S = 1.0
_GROW_POLL_S = 10.0  # between checks for machines onto which a smaller group could grow
_RELEASE_S = 20.0  # for Ray to release the resources of lost workers
_CONFIRM_S = 3.0  # for which a hang must persist before a worker is killed
_MAX_PLACEMENTS = 5  # failed ones in a row: Ray still lists a machine for a while after it died


@dataclass(frozen=True)
class _Stopped:
    """A group of workers that stopped early on request."""

    message: str
    drained: bool  # whether it stopped because one of its machines will be taken away


@dataclass(frozen=True)
class _Lost:
    """A group of workers that failed."""

    reason: str
    placed: bool  # whether the workers were running
    error: BaseException


def train_on_ray(
    config: RunConfig,
    data_folder: str,
    run_folder: Path,
    stop: threading.Event,
    async_evaluation: AsyncEvaluation | None = None,
) -> None:
    """Train on all workers to the end; lost or hung workers are restarted from the newest checkpoint.

    At most `cluster.max_failures` restarts are made without a new checkpoint in between. Between
    `cluster.min_workers` and `cluster.workers` workers run, as many as fit into the cluster. Setting `stop`
    ends the training after the current step with `Preempted`. `async_evaluation` is polled while workers run.
    Raises `FindRecError` for errors that a restart would not fix.
    """
    machines = cluster_machines()
    config, gpu = use_gpus(config, machines, announce=True)
    _refuse_split_tracking(config, machines, gpu)
    failures = failed_placements = 0
    committed = _newest_checkpoints(config, run_folder)
    wait_s = config.cluster.wait_s
    while True:
        workers = wait_for_room(config, gpu=gpu, wait_s=wait_s)
        cluster = config.cluster.model_copy(update={"workers": workers})
        group = _Group(config.model_copy(update={"cluster": cluster}), config, gpu, stop, async_evaluation)
        ended = group.run(data_folder, run_folder)
        if ended is None:
            return
        if async_evaluation is not None:
            async_evaluation.pause()
        if isinstance(ended, _Stopped):
            if stop.is_set():
                raise Preempted(ended.message)
            wait_s = _replacement_wait_s(config) if ended.drained else 0.0
            continue
        now = _newest_checkpoints(config, run_folder)
        if now != committed:
            committed, failures = now, 0
        failures, failed_placements = (failures + 1, 0) if ended.placed else (failures, failed_placements + 1)
        if stop.is_set():
            raise Preempted(f"the last checkpoint is {_describe_newest_checkpoint(config, run_folder)}")
        if failures > config.cluster.max_failures or failed_placements > _MAX_PLACEMENTS:
            say(f"{ended.reason}; cluster.max_failures={config.cluster.max_failures} restarts did not help")
            raise ended.error
        count = f"restart {failures} of {config.cluster.max_failures}" if failures else "placing them again"
        say(f"{ended.reason}: {count}, from {_describe_newest_checkpoint(config, run_folder)}")
        wait_s = _replacement_wait_s(config)


def _replacement_wait_s(config: RunConfig) -> float:
    """Seconds to wait for a machine that replaces a lost one."""
    return (
        _RELEASE_S
        if min_workers(config) < config.cluster.workers
        else max(_RELEASE_S, config.cluster.timeout_s)
    )


def _refuse_split_tracking(config: RunConfig, machines: Sequence[Machine], gpu: bool) -> None:
    try:
        num_nodes = len(place_workers(config, machines, gpu=gpu))
    except FindRecError:
        return  # no room yet, and the machines to come are not known
    refuse_split_tracking(config, num_nodes)


def _newest_checkpoints(config: RunConfig, run_folder: Path) -> list[str]:
    """The newest checkpoint of each training; a change shows that a group made progress."""
    return [
        str(paths[-1])
        for job in training_jobs(config, run_folder)
        if (paths := list_checkpoints(checkpoint_folder(job.folder)))
    ]


def _describe_newest_checkpoint(config: RunConfig, run_folder: Path) -> str:
    for job in reversed(training_jobs(config, run_folder)):
        newest = latest_checkpoint(checkpoint_folder(job.folder))
        if newest is not None:
            return f"the checkpoint {newest.name} of {job.name}"
    return "the start"


class _Group:
    """One group of workers, from its placement to its end."""

    def __init__(
        self,
        config: RunConfig,
        requested: RunConfig,
        gpu: bool,
        stop: threading.Event,
        async_evaluation: AsyncEvaluation | None,
    ) -> None:
        import ray

        self._config, self._requested, self._gpu, self._stop = config, requested, gpu, stop
        self._async_evaluation = async_evaluation
        self._registry: Any = ray.remote(num_cpus=0, max_restarts=0)(HeartbeatRegistry).remote()
        self._hung = ""
        self._suspects: tuple[float, set[int]] | None = None
        self._stop_requested = self._drained = False
        self._last_grow_check = time.monotonic()

    def run(self, data_folder: str, run_folder: Path) -> _Stopped | _Lost | None:
        """Train to the end; returns None on success."""
        import ray

        outcome = self._start(data_folder, run_folder)
        try:
            while True:
                try:
                    returned = outcome.result(timeout=_POLL_S)
                    break
                except StillRunning:
                    self._poll()
        except Exception as error:
            return self._describe_failure(error)
        finally:
            ray.kill(self._registry)
        result: Mapping[str, Any] = returned or {}
        if RESULT_ERROR in result:
            raise DivergedError(result[RESULT_ERROR])
        if RESULT_STOPPED in result:
            return _Stopped(result[RESULT_STOPPED], self._drained)
        return None

    def _start(self, data_folder: str, run_folder: Path) -> Future[Any]:
        """Run `trainer.fit()` in a thread; if the wait is interrupted, `ray.shutdown` ends it.

        In the main thread it would handle Ctrl-C itself: exit with code 1 or, after the end of training,
        ignore it.
        """
        from ray.train import FailureConfig, LoggingConfig, ScalingConfig
        from ray.train import RunConfig as RayRunConfig

        from findrec.cluster.trainer import Trainer, WorkerConfig
        from findrec.cluster.worker import train_worker

        config = self._config
        backend = "nccl" if self._gpu else "gloo"
        resources = "1 GPU" if self._gpu else f"{worker_threads(config)} CPU threads"
        say(
            f"placing {config.cluster.workers} workers ({resources} each, {backend}), "
            f"ZeRO stage {config.cluster.zero_stage}, python {sys.executable}"
        )
        trainer = Trainer(
            train_worker,
            train_loop_config={
                "config": config.model_dump(mode="json"),
                "data_folder": data_folder,
                "run_folder": str(run_folder),
                "heartbeats": self._registry,
            },
            scaling_config=ScalingConfig(
                num_workers=config.cluster.workers,
                use_gpu=self._gpu,
                resources_per_worker=worker_resources(config, gpu=self._gpu),
            ),
            torch_config=WorkerConfig(backend=backend, timeout_s=int(config.cluster.timeout_s)),
            run_config=RayRunConfig(
                name="ray",
                storage_path=str(run_folder),
                failure_config=FailureConfig(max_failures=0),
                logging_config=LoggingConfig(log_level="ERROR"),
            ),
        )
        outcome: Future[Any] = Future()

        def fit() -> None:
            try:
                outcome.set_result(trainer.fit().return_value)  # that of rank 0; all return the same
            except BaseException as error:
                outcome.set_exception(error)

        threading.Thread(target=fit, name="ray-train", daemon=True).start()
        return outcome

    def _poll(self) -> None:
        import ray

        if self._async_evaluation is not None:
            self._async_evaluation.poll()
        now = time.monotonic()
        if not self._stop_requested and (self._stop.is_set() or self._could_grow(now)):
            if self._stop.is_set():
                say("stopping: the step under way is finished and saved")
            self._ask_to_stop()
        cluster = self._config.cluster
        try:
            statuses: list[ObservedStatus] = ray.get(self._registry.statuses.remote(), timeout=10)
            draining = draining_machines()
        except Exception:  # an overloaded machine, or the registry is lost, which Ray detects
            return
        hosts = {s.status.host for s in statuses if s.status.node in draining}
        if hosts and not self._stop_requested:
            self._drained = True
            say(f"{', '.join(sorted(hosts))} will be taken away: the workers stop at the next step and move")
            self._ask_to_stop()
        hung = find_hung(statuses, hang_s=cluster.hang_s, timeout_s=cluster.timeout_s)
        ranks = {s.status.rank for s in hung}
        if not hung or self._suspects is None or self._suspects[1] != ranks:
            self._suspects = (now, ranks) if hung else None
            return
        if now - self._suspects[0] < _CONFIRM_S:
            return
        self._suspects = None
        self._hung = describe_hang(hung, statuses)
        warn(f"WARNING: hung: {self._hung}. It is killed")
        for s in hung:
            kill_worker(s.status)

    def _ask_to_stop(self) -> None:
        self._stop_requested = True
        self._registry.request_stop.remote()

    def _could_grow(self, now: float) -> bool:
        """Whether the cluster has room for more workers than this group has."""
        current = self._config.cluster.workers
        if current == self._requested.cluster.workers or now - self._last_grow_check < _GROW_POLL_S:
            return False
        self._last_grow_check = now
        larger = shareable(self._requested, fitting_workers(self._requested, gpu=self._gpu, running=current))
        if larger > current:
            say(
                f"there is room for {larger} workers: the {current} that run stop at the next step and are "
                "placed again"
            )
        return larger > current

    def _describe_failure(self, error: Exception) -> _Lost:
        """The reason of a failure; raises the error instead if a restart would not fix it."""
        failures: Mapping[int, BaseException] = getattr(error, "worker_failures", None) or {}
        for failure in [*failures.values(), error.__cause__, error]:
            if (user_error := unwrap_user_error(failure) or system_error(failure)) is not None:
                raise user_error from error
        dead = [rank for rank, failure in failures.items() if _is_lost(failure)]
        if self._hung:
            return _Lost(f"a hung worker was killed ({self._hung})", True, error)
        if dead:
            names = ", ".join(map(str, sorted(dead)))
            return _Lost(f"worker {names} of {self._config.cluster.workers} was lost", True, error)
        if not failures:
            return _Lost("the workers could not be placed", False, error)
        for failure in failures.values():
            if not isinstance(failure, RuntimeError | OSError) or "out of memory" in str(failure).lower():
                raise failure from error
        first = str(next(iter(failures.values()))).splitlines()[0]
        if "by peer" in first:  # Ray does not name the lost worker if its machine was lost
            return _Lost("the connection to a worker was lost", True, error)
        return _Lost(f"workers failed ({first[:200]})", True, error)


def _is_lost(failure: BaseException) -> bool:
    from ray.exceptions import RayError
    from ray.train.v2._internal.exceptions import WorkerHealthCheckFailedError, WorkerHealthCheckTimeoutError

    return isinstance(failure, RayError | WorkerHealthCheckFailedError | WorkerHealthCheckTimeoutError)
