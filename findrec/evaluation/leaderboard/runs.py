"""Trains the runs of a leaderboard that are not finished, each by `python -m findrec.train_dist`.

A run is a process of its own, so it resumes, stops and reports its errors like any other run.
"""

from __future__ import annotations

import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from contextlib import AbstractContextManager, contextmanager, nullcontext
from pathlib import Path
from typing import IO, Any, Protocol

import yaml

from findrec.config import RunConfig
from findrec.datasets.folder.data_folder import DataFolder
from findrec.errors import FindRecError, Preempted
from findrec.evaluation.compare.results import read_rows
from findrec.evaluation.leaderboard.config import Run
from findrec.evaluation.protocol import RankingProtocol
from findrec.evaluation.scoring.load import check_run_data
from findrec.progress import format_seconds, progress, say, warn
from findrec.schema import changes
from findrec.sigterm import handles_sigterm
from findrec.training.checkpoints.budget import is_over
from findrec.training.checkpoints.checkpoint import checkpoint_folder, list_checkpoints
from findrec.training.checkpoints.manifest import MANIFEST
from findrec.training.checkpoints.validations import saved_state
from findrec.training.runs import (
    TrainingJob,
    open_run_folder,
    read_run_config,
    run_folder,
    training_jobs,
    with_saved_tokens,
)

LOG = "train.log"  # the output of a run that is trained beside others
_MOST_FAILURES = 3  # after which no further runs are started
_NEWS_S = 5.0  # between updates of the progress of runs side by side
_LAST_LINES = 5  # of the log of a failed run, in the error
_ROOM_S = 1.0  # between attempts to reserve room


class Room(Protocol):
    """The room for runs side by side."""

    def reserve(self, run: str, config: RunConfig) -> bool:
        """Reserve what a run needs until `release`; False if there is no room now."""

    def release(self, run: str) -> None:
        """Give back what a run has reserved."""


Share = Callable[[Sequence[RunConfig]], AbstractContextManager[Room | None]]


def _no_sharing(_: Sequence[RunConfig]) -> AbstractContextManager[None]:
    return nullcontext()


def train_runs(
    runs: Sequence[Run], folders: Mapping[str, DataFolder], jobs: int = 1, share: Share = _no_sharing
) -> None:
    """Train and evaluate the runs that are not finished, up to `jobs` of them at a time.

    After three runs that fail no further ones are started. With several jobs the output of each goes to
    `train.log` in its folder.

    Args:
        runs: the runs, in the order in which they are started.
        folders: the data folders, by the label of the data set.
        jobs: number of processes side by side; 0: as many as there is room for.
        share: with several jobs, makes the cluster for processes started inside the context, and its room;
            a room of None is unlimited.

    Raises:
        FindRecError: if a run has checkpoints of another configuration or of other data, before anything is
            trained; or if runs failed, after the others that were started.
        Preempted: on SIGTERM, after the runs under way have saved their step.
    """
    pending = [run for run in runs if not is_finished(run.config, folders[run.data])]
    for run in pending:
        _check_resumable(run)
    say(f"{len(runs) - len(pending)} of {len(runs)} runs are finished, {len(pending)} are to be trained")
    if not pending:
        return
    if jobs == 1:
        processes = _Processes(len(pending), 1, None)
        failed = processes.train(pending)
    else:
        with share([run.config for run in pending]) as room:
            processes = _Processes(len(pending), jobs or len(pending), room)
            failed = processes.train(pending)
    if failed:
        left = f", and then {processes.left} were not started" if processes.left else ""
        raise FindRecError(
            f"{len(failed)} of {len(pending)} runs failed{left}: {'; '.join(failed)}. There is no table "
            "without them; correct the cause, or leave out their rows. The same command trains only what is "
            "missing"
        )
    for run in pending:
        if not is_finished(run.config, folders[run.data]):
            raise FindRecError(f"{run.title} ended, but {run_folder(run.config)} has no results. Start again")


def is_finished(config: RunConfig, folder: DataFolder) -> bool:
    """Whether a run is trained to the end and evaluated, with this configuration and by this protocol.

    Raises `FindRecError` if its checkpoints are of other data.
    """
    path = run_folder(config)
    metrics = path / "metrics.json"
    if not metrics.is_file() or not (path / "ranks.parquet").is_file():
        return False
    if changes(read_run_config(path), with_saved_tokens(config), "resume"):
        return False
    check_run_data(config, path, folder)
    try:
        rows = {str(row["model"]): row for row in read_rows(path).get("test", [])}
    except FindRecError:
        return False  # damaged; they are written again
    protocol = RankingProtocol.of(config, folder).describe(folder)
    if rows.get(config.model.title, {}).get("protocol") != protocol:
        return False
    ends = [_end_of(job) for job in training_jobs(config, path)]
    return all(end is not None and end <= metrics.stat().st_mtime_ns for end in ends)


def _end_of(job: TrainingJob) -> int | None:
    """When the last checkpoint of a finished training was written, in ns; None if it is not finished."""
    paths = list_checkpoints(checkpoint_folder(job.folder))
    state = saved_state(paths[-1]) if paths else None
    if state is None or state.epoch_step or not is_over(job.config.training, state):
        return None
    return (paths[-1] / MANIFEST).stat().st_mtime_ns


def _check_resumable(run: Run) -> None:
    """Raise `FindRecError` if the run's folder has checkpoints of another configuration."""
    folder = run_folder(run.config)
    if any(list_checkpoints(checkpoint_folder(job.folder)) for job in training_jobs(run.config, folder)):
        try:
            open_run_folder(run.config)
        except FindRecError as error:
            raise FindRecError(
                f"{run.title}: {error} In a leaderboard the labels and its `name` make the name of a run; "
                "there is no --fresh: delete the folder instead"
            ) from None


class _Processes:
    """The processes of the runs under way."""

    def __init__(self, total: int, jobs: int, room: Room | None) -> None:
        self._total, self._jobs, self._room = total, jobs, room
        self._beside = room is not None or jobs > 1  # a single run shows its own progress
        self._running: set[subprocess.Popen[bytes]] = set()
        self._lock = threading.Lock()
        self._stop = False
        self._started = self._done = 0
        self._begin = time.monotonic()

    @property
    def left(self) -> int:
        """How many runs were not started."""
        return self._total - self._started

    def train(self, runs: Sequence[Run]) -> list[str]:
        """Train all; returns a description of each failure."""
        failed = []
        with (
            handles_sigterm(_raise_preempted),
            progress("leaderboard", self._total, "runs", show=self._beside) as bar,
            ThreadPoolExecutor(self._jobs) as pool,
        ):
            waiting, left = deque(runs), set[Future[str | None]]()
            try:
                while left or (waiting and not self._stop):
                    while waiting and len(left) < self._jobs and self._may_start(waiting[0]):
                        left.add(pool.submit(self._run, waiting.popleft()))
                    if not left:
                        time.sleep(_ROOM_S)
                    seconds = _ROOM_S if waiting else _NEWS_S
                    done, left = wait(left, timeout=seconds, return_when=FIRST_COMPLETED)
                    for problem in filter(None, (future.result() for future in done)):
                        failed.append(problem)
                        warn(f"FAILED: {problem}")
                    if len(failed) >= _MOST_FAILURES:
                        self._stop = True
                    bar.advance(len(done))
                    bar.note(running=len(self._running))
            except BaseException as error:  # Ctrl-C or SIGTERM; leaving the block waits for the processes
                self._end(signal.SIGINT if isinstance(error, KeyboardInterrupt) else signal.SIGTERM)
                raise
        return failed

    def _may_start(self, run: Run) -> bool:
        return not self._stop and (self._room is None or self._room.reserve(run.title, run.config))

    def _end(self, number: signal.Signals) -> None:
        with self._lock:
            self._stop = True
            for process in self._running:
                process.send_signal(number)

    def _run(self, run: Run) -> str | None:
        """Train one; returns the problem if it fails."""
        try:
            return self._train(run)
        finally:
            if self._room is not None:
                self._room.release(run.title)

    def _train(self, run: Run) -> str | None:
        folder, begin = run_folder(run.config), time.monotonic()
        with tempfile.NamedTemporaryFile("w", suffix=".yaml", encoding="utf-8") as file:
            # Not `config.yaml` of the run folder: there no key is left open for the machine to decide.
            yaml.safe_dump(run.tree, file, sort_keys=False)
            file.flush()
            with _output(folder / LOG if self._beside else None) as output:
                if (process := self._start(run, file.name, output)) is None:
                    return None
                try:
                    code = process.wait()
                finally:
                    with self._lock:
                        self._running.discard(process)
        if code:
            return f"{run.title} ({folder}): exit code {code}{self._last_lines(folder)}"
        self._report(run, time.monotonic() - begin)
        return None

    def _start(self, run: Run, path: str, output: IO[Any] | None) -> subprocess.Popen[bytes] | None:
        with self._lock:
            if self._stop:
                return None
            self._started += 1
            log = "" if output is None else f", its output is in {output.name}"
            say(f"run {self._started} of {self._total}: {run.title}{log}")
            # In a session of its own, so that Ctrl-C reaches it once, and when no other run is to start.
            process = subprocess.Popen(
                [sys.executable, "-m", "findrec.train_dist", "--config", path],
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=None if output is None else subprocess.STDOUT,
                start_new_session=True,
            )
            self._running.add(process)
            return process

    def _report(self, run: Run, seconds: float) -> None:
        with self._lock:
            self._done += 1
            left = self._total - self._done
            eta = (time.monotonic() - self._begin) / self._done * left
            more = f"; {left} left, about {format_seconds(eta)}" if left else ""
            say(f"{run.title}: done in {format_seconds(seconds)}{more}")

    def _last_lines(self, folder: Path) -> str:
        if not self._beside:
            return ", its message is above"
        text = (folder / LOG).read_text(encoding="utf-8", errors="replace")
        return f", {folder / LOG} ends with: {' | '.join(text.splitlines()[-_LAST_LINES:])}"


@contextmanager
def _output(path: Path | None) -> Iterator[IO[Any] | None]:
    """A log file that is continued; None for the output of this process."""
    if path is None:
        yield None
        return
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("ab") as file:
        yield file


def _raise_preempted(*_: object) -> None:
    raise Preempted("the runs under way have saved their step")
