"""The evaluator of `evaluation.evaluator=async`, which validates committed checkpoints during training.

The driver calls it repeatedly to validate the checkpoints that are due
(`findrec.training.checkpoints.validations`). It communicates with workers only by files, so no step waits for
it, and after a restart it continues. When nothing is due, it runs the final evaluation of finished trainings.
"""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Mapping
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import torch

from findrec.config import parse_config
from findrec.datasets.folder.data_folder import DataFolder
from findrec.errors import FindRecError
from findrec.evaluation.metrics.metrics import summarise
from findrec.evaluation.protocol import RankingProtocol
from findrec.evaluation.ranking.evaluate import Ranked, Rows, rank_split
from findrec.evaluation.run import evaluate_run, rank_scorers, scorer_names
from findrec.evaluation.scoring.load import load_ranker
from findrec.evaluation.validation import describe_row
from findrec.ops.precision import full_float32
from findrec.progress import say, warn
from findrec.ray_session import ray_session, worker_threads
from findrec.training.checkpoints.budget import is_over
from findrec.training.checkpoints.checkpoint import checkpoint_folder, list_checkpoints, read_state
from findrec.training.checkpoints.validations import (
    METRICS,
    Validation,
    best_checkpoint_path,
    checkpoint_digest,
    due_checkpoints,
    read_validations,
    record_validation,
    saved_state,
)
from findrec.training.logs.tracking import Tracker
from findrec.training.runs import TrainingJob, training_jobs

_TRIES = 3  # for a checkpoint that cannot be read, as it may be being replaced
_NICENESS = 10  # of 19


class Evaluator:
    """Validates and evaluates, one task per call of `work`; used as a Ray actor or as a plain object."""

    def __init__(
        self,
        config: Mapping[str, Any],
        data_folder: str,
        run_folder: str,
        ranking_threads: int,
        *,
        gpu: bool,
    ) -> None:
        """Raises `FindRecError` if the run folder is not visible on this machine.

        `ranking_threads` is the number of threads of a final evaluation; a validation uses as many as a
        worker. Without `gpu` the GPUs of this machine are left to the workers.
        """
        if not gpu:
            os.environ["CUDA_VISIBLE_DEVICES"] = ""
        self._config = parse_config(dict(config))
        self._run = Path(run_folder)
        if not (self._run / "config.yaml").is_file():
            raise FindRecError(
                f"the evaluator runs on {os.uname().nodename}, where there is no run folder {run_folder}. "
                "Set `runs` to a folder that all machines share, or evaluation.evaluator=inline"
            )
        cache_bytes = self._config.data.cache_bytes
        self._folder = DataFolder.open(data_folder, verify=False, cache_bytes=cache_bytes)
        self._threads = ranking_threads
        self._device = (
            "cuda" if torch.cuda.is_available() and self._config.cluster.gpu is not False else "cpu"
        )
        self._failures: Counter[str] = Counter()
        self._known: dict[str, tuple[str | None, Ranked]] = {}
        self._trackers: dict[str, Tracker] = {}

    def yield_to_others(self) -> None:
        """Give the workers of this machine priority."""
        os.nice(_NICENESS)

    def work(self) -> bool:
        """Validate a checkpoint that is due, else evaluate a finished training; False if there is neither."""
        jobs = training_jobs(self._config, self._run)
        for job in jobs:
            for path in due_checkpoints(job.config, job.folder):
                if self._failures[str(path)] < _TRIES:
                    self._validate(job, path)
                    return True
        trained = {job.name for job in jobs}
        ready = {job.name for job in jobs if _is_trained(job)}
        for name in scorer_names(self._config):
            if name not in self._known and (name in ready or name not in trained):
                torch.set_num_threads(self._threads)
                digest, shards = self._digest(name), self._config.evaluation.shards
                self._known[name] = (digest, rank_scorers(self._run, self._folder, [name], shards=shards))
                return True
        return False

    def _validate(self, job: TrainingJob, path: Path) -> None:
        torch.set_num_threads(worker_threads(self._config))
        try:
            digest, state = checkpoint_digest(path), read_state(path)
            with full_float32(self._device):
                scorer = load_ranker(job, self._folder, self._device, checkpoint=path)
        except (FindRecError, OSError) as error:
            self._failures[str(path)] += 1
            if self._failures[str(path)] == _TRIES:
                warn(f"WARNING: no validation of {job.name} at {path.name}: {error}")
            return
        shards = self._config.evaluation.shards
        protocol = RankingProtocol.of_validation(job.config, self._folder)
        with (
            full_float32(self._device),
            ray_session(self._config) if shards else nullcontext(),
            scorer.distributed(self._run, shards) as ranker,
        ):
            ranks = rank_split(ranker, self._folder, "valid", protocol)
        row = summarise(ranks, self._folder, "valid", protocol, model=job.config.model.name)
        if digest is None or digest != checkpoint_digest(path):
            return  # replaced meanwhile, so it is due again
        values = {name: row[name] for name in METRICS}
        validation = Validation(state.step, state.epoch, digest, values)
        record_validation(job.folder, validation)
        self._mirror(job, validation)
        say(f"  validation of {job.name}, epoch {state.epoch}: {describe_row(row)}")

    def _mirror(self, job: TrainingJob, validation: Validation) -> None:
        """Log to MLflow; at first all validations, as an earlier evaluator may not have sent some."""
        validations = [validation]
        if job.name not in self._trackers:
            self._trackers[job.name] = Tracker.join(job.config, job.folder)
            validations = read_validations(job.folder)
        for one in validations:
            self._trackers[job.name].log(one.step, one.logged)

    def _digest(self, name: str) -> str | None:
        """The digest of the checkpoint that is evaluated; None for an untrained baseline."""
        for job in training_jobs(self._config, self._run):
            if job.name == name and (best := best_checkpoint_path(checkpoint_folder(job.folder))) is not None:
                return checkpoint_digest(best)
        return None

    def finish(self) -> Rows:
        """Finish the evaluation of the run (`evaluate_run`); returns the metrics rows by split."""
        for tracker in self._trackers.values():
            tracker.finish()
        torch.set_num_threads(self._threads)
        known = {
            name: ranked for name, (digest, ranked) in self._known.items() if digest == self._digest(name)
        }
        return evaluate_run(self._run, known=known, show=False)


def _is_trained(job: TrainingJob) -> bool:
    """Whether a training has finished, so that its best checkpoint is known when nothing is due."""
    saved = [p for p in list_checkpoints(checkpoint_folder(job.folder)) if checkpoint_digest(p) is not None]
    state = saved_state(saved[-1]) if saved else None
    return state is not None and is_over(job.config.training, state)
