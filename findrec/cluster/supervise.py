"""The driver's side of a training: place the workers, watch them, start them again, end them in order.

Ray Train runs one group of workers at a time; that it may fail is decided here, not there, because the number
of workers must divide a step's microbatches, a stop must wait for a checkpoint, and a mistake in the data
must not be tried again. Everything the workers need travels as plain values; checkpoints are files.
"""

from __future__ import annotations

import sys
import threading
import time
from collections.abc import Mapping, Sequence
from concurrent.futures import Future
from concurrent.futures import TimeoutError as NotYet
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from findrec.cluster.board import Board, Seen
from findrec.cluster.launch import worker_threads
from findrec.cluster.machines import Machine, cluster_machines, has_gpus, place_workers
from findrec.cluster.placement import (
    least,
    leaving_machines,
    room,
    shareable,
    wait_for_room,
    worker_resources,
)
from findrec.cluster.pulse import find_hung, kill_worker
from findrec.config import RunConfig
from findrec.errors import DivergedError, FindRecError, Preempted, find_mistake
from findrec.progress import say
from findrec.training.checkpoint import latest_checkpoint, list_checkpoints
from findrec.training.runs import checkpoint_folder, training_jobs
from findrec.training.tracking import refuse_split_tracking

if TYPE_CHECKING:
    from findrec.cluster.beside import Beside  # which imports what no worker needs

RESULT_ERROR, RESULT_STOPPED = "error", "stopped"  # what `train_worker` may return, beside nothing

_LOOK_S = 1.0
_GROW_LOOK_S = 10.0  # between looks for machines that a smaller group could grow onto
_ROOM_S = 20.0  # that the places of lost workers may take to become free
_SETTLE_S = 3.0  # for a hang to be seen twice before somebody is killed
_PLACINGS = 5  # in a row that may fail: a machine that has just died is still listed for a while


@dataclass(frozen=True)
class _Stopped:
    """A group of workers that was asked to end before its time."""

    where: str
    drained: bool  # whether it was since a machine of its is taken away


@dataclass(frozen=True)
class _Lost:
    """A group of workers that did not end by itself."""

    why: str
    placed: bool  # whether it got as far as running
    error: BaseException


def train_on_ray(
    config: RunConfig,
    data_folder: str,
    run_folder: Path,
    stop: threading.Event,
    beside: Beside | None = None,
) -> None:
    """Train on all workers to the end; lost or hung ones are replaced, from the newest checkpoint.

    Restarts are counted until a new checkpoint is there, `cluster.max_failures` of them are taken. Between
    `cluster.min_workers` and `cluster.workers` as many run as there is room for. `stop` being set ends the
    training at the next step with `Preempted`. `beside` is looked at while they run. Raises `FindRecError`
    for what no restart would mend.
    """
    machines = cluster_machines()
    gpu = has_gpus(config, machines)
    _refuse_split_tracking(config, machines, gpu)
    failures = placings = 0
    committed = _committed(config, run_folder)
    wait_s = config.cluster.wait_s
    while True:
        workers = wait_for_room(config, gpu=gpu, wait_s=wait_s)
        cluster = config.cluster.model_copy(update={"workers": workers})
        group = _Group(config.model_copy(update={"cluster": cluster}), config, gpu, stop, beside)
        ended = group.run(data_folder, run_folder)
        if ended is None:
            return
        if beside is not None:
            beside.pause()
        if isinstance(ended, _Stopped):
            if stop.is_set():
                raise Preempted(ended.where)
            wait_s = _patience(config) if ended.drained else 0.0
            continue
        now = _committed(config, run_folder)
        if now != committed:
            committed, failures = now, 0
        failures, placings = (failures + 1, 0) if ended.placed else (failures, placings + 1)
        if stop.is_set():
            raise Preempted(f"the last checkpoint is {_newest(config, run_folder)}")
        if failures > config.cluster.max_failures or placings > _PLACINGS:
            say(f"{ended.why}; cluster.max_failures={config.cluster.max_failures} restarts did not help")
            raise ended.error
        count = f"restart {failures} of {config.cluster.max_failures}" if failures else "placing them again"
        say(f"{ended.why}: {count}, from {_newest(config, run_folder)}")
        wait_s = _patience(config)


def _patience(config: RunConfig) -> float:
    """Seconds that another machine may take to come in place of one that went."""
    return _ROOM_S if least(config) < config.cluster.workers else max(_ROOM_S, config.cluster.timeout_s)


def _refuse_split_tracking(config: RunConfig, machines: Sequence[Machine], gpu: bool) -> None:
    try:
        nodes = len(place_workers(config, machines, gpu=gpu))
    except FindRecError:
        return  # there is no room yet, and who will come is not known
    refuse_split_tracking(config, nodes)


def _committed(config: RunConfig, run_folder: Path) -> list[str]:
    """Names of the newest checkpoints: whether a group got anywhere."""
    return [
        str(path[-1])
        for job in training_jobs(config, run_folder)
        if (path := list_checkpoints(checkpoint_folder(job.folder)))
    ]


def _newest(config: RunConfig, run_folder: Path) -> str:
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
        wanted: RunConfig,
        gpu: bool,
        stop: threading.Event,
        beside: Beside | None,
    ) -> None:
        import ray

        self._config, self._wanted, self._gpu, self._stop = config, wanted, gpu, stop
        self._beside = beside
        self._board: Any = ray.remote(num_cpus=0, max_restarts=0)(Board).remote()
        self._blamed = ""
        self._suspects: tuple[float, set[int]] | None = None
        self._asked = self._drained = False
        self._looked = time.monotonic()

    def run(self, data_folder: str, run_folder: Path) -> _Stopped | _Lost | None:
        """Train; None when done."""
        import ray

        outcome = self._start(data_folder, run_folder)
        try:
            while True:
                try:
                    returned = outcome.result(timeout=_LOOK_S)
                    break
                except NotYet:
                    self._look()
        except Exception as error:
            return self._lost(error)
        finally:
            ray.kill(self._board)
        result: Mapping[str, Any] = returned or {}
        if RESULT_ERROR in result:
            raise DivergedError(result[RESULT_ERROR])
        if RESULT_STOPPED in result:
            return _Stopped(result[RESULT_STOPPED], self._drained)
        return None

    def _start(self, data_folder: str, run_folder: Path) -> Future[Any]:
        """`trainer.fit()` in a thread of its own; interrupting the wait leaves its end to `ray.shutdown`.

        Called from the main thread it would handle Ctrl-C itself: end with exit code 1 or, once training is
        over, swallow it.
        """
        from ray.train import FailureConfig, LoggingConfig, ScalingConfig
        from ray.train import RunConfig as RayRunConfig
        from ray.train.torch import TorchConfig

        from findrec.cluster.trainer import Trainer
        from findrec.cluster.worker import train_worker

        config = self._config
        backend = "nccl" if self._gpu else "gloo"
        share = "1 GPU" if self._gpu else f"{worker_threads(config)} CPU threads"
        say(
            f"placing {config.cluster.workers} workers ({share} each, {backend}), "
            f"ZeRO stage {config.cluster.zero_stage}, python {sys.executable}"
        )
        trainer = Trainer(
            train_worker,
            train_loop_config={
                "config": config.model_dump(mode="json"),
                "data_folder": data_folder,
                "run_folder": str(run_folder),
                "board": self._board,
            },
            scaling_config=ScalingConfig(
                num_workers=config.cluster.workers,
                use_gpu=self._gpu,
                resources_per_worker=worker_resources(config, gpu=self._gpu),
            ),
            torch_config=TorchConfig(backend=backend, timeout_s=int(config.cluster.timeout_s)),
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
                outcome.set_result(trainer.fit().return_value)  # rank 0's; all return the same
            except BaseException as error:
                outcome.set_exception(error)

        threading.Thread(target=fit, name="ray-train", daemon=True).start()
        return outcome

    def _look(self) -> None:
        import ray

        if self._beside is not None:
            self._beside.look()
        now = time.monotonic()
        if not self._asked and (self._stop.is_set() or self._could_grow(now)):
            if self._stop.is_set():
                say("stopping: the step under way is finished and saved")
            self._ask_to_stop()
        cluster = self._config.cluster
        try:
            seen: list[Seen] = ray.get(self._board.look.remote(), timeout=10)
            gone = leaving_machines()
        except Exception:  # the machine is overloaded, or the board went with its machine: Ray sees the loss
            return
        hosts = {s.sign.host for s in seen if s.sign.node in gone}
        if hosts and not self._asked:
            self._drained = True
            say(f"{', '.join(sorted(hosts))} will be taken away: the workers stop at the next step and move")
            self._ask_to_stop()
        hung = find_hung(seen, hang_s=cluster.hang_s, timeout_s=cluster.timeout_s)
        ranks = {s.sign.rank for s in hung}
        if not hung or self._suspects is None or self._suspects[1] != ranks:
            self._suspects = (now, ranks) if hung else None
            return
        if now - self._suspects[0] < _SETTLE_S:
            return
        self._suspects = None
        still = max(max(s.silent_s, s.still_s) for s in hung)
        self._blamed = f"{'; '.join(str(s.sign) for s in hung)}: no progress for {still:.0f} s"
        say(f"WARNING: hung: {self._blamed}. It is killed")
        for s in hung:
            kill_worker(s.sign)

    def _ask_to_stop(self) -> None:
        self._asked = True
        self._board.ask_to_stop.remote()

    def _could_grow(self, now: float) -> bool:
        have = self._config.cluster.workers
        if have == self._wanted.cluster.workers or now - self._looked < _GROW_LOOK_S:
            return False
        self._looked = now
        more = shareable(self._wanted, room(self._wanted, gpu=self._gpu, held=have))
        if more > have:
            say(f"there is room for {more} workers: the {have} that run stop at the next step and make way")
        return more > have

    def _lost(self, error: Exception) -> _Lost:
        """What a group ended with, in words; raises what a restart would not mend."""
        failures: Mapping[int, BaseException] = getattr(error, "worker_failures", None) or {}
        for failure in [*failures.values(), error.__cause__, error]:
            if (mistake := find_mistake(failure)) is not None:
                raise mistake from error
        dead = [rank for rank, failure in failures.items() if _is_lost(failure)]
        if self._blamed:
            return _Lost(f"a hung worker was killed ({self._blamed})", True, error)
        if dead:
            names = ", ".join(map(str, sorted(dead)))
            return _Lost(f"worker {names} of {self._config.cluster.workers} was lost", True, error)
        if not failures:
            return _Lost("the workers could not be placed", False, error)
        for failure in failures.values():
            if not isinstance(failure, RuntimeError | OSError) or "out of memory" in str(failure).lower():
                raise failure from error
        first = str(next(iter(failures.values()))).splitlines()[0]
        if "by peer" in first:  # the one that went is not told of when its whole machine did
            return _Lost("the connection to a worker was lost", True, error)
        return _Lost(f"workers failed ({first[:200]})", True, error)


def _is_lost(failure: BaseException) -> bool:
    from ray.exceptions import RayError
    from ray.train.v2._internal.exceptions import WorkerHealthCheckFailedError, WorkerHealthCheckTimeoutError

    return isinstance(failure, RayError | WorkerHealthCheckFailedError | WorkerHealthCheckTimeoutError)
