"""The evaluator beside training (`evaluation.evaluator=async`), which validates committed checkpoints.

The driver asks it again and again to do what is due (`findrec.training.validations`). It takes nothing from
the workers, so no step waits for it, and after a kill it goes on with what is still due. While nothing is, it
ranks in full whatever is trained to the end, so that little is left when training is over.
"""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Mapping
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import torch

from findrec.cluster.launch import ray_session, worker_threads
from findrec.config import parse_config
from findrec.datasets.folder import DataFolder
from findrec.errors import FindRecError
from findrec.evaluation.evaluate import Ranked, Rows, rank_split
from findrec.evaluation.load import load_scorer
from findrec.evaluation.run import evaluate_run, rank_scorers, scorer_names
from findrec.evaluation.shards import sharded
from findrec.progress import say
from findrec.training.checkpoint import list_checkpoints, read_state
from findrec.training.runs import TrainingJob, checkpoint_folder, training_jobs
from findrec.training.tracking import Tracker
from findrec.training.validation import describe_row, ranking_settings, validation_row
from findrec.training.validations import (
    METRICS,
    Validation,
    best_checkpoint_path,
    checkpoint_digest,
    due_checkpoints,
    read_validations,
    record_validation,
)

_TRIES = 3  # of a checkpoint that cannot be read: it may be about to be saved anew
_YIELDS = 10  # to the workers of its machine: of Unix's 19 levels of being nice


class Evaluator:
    """What the actor does, one piece at a time; a plain object does the same."""

    def __init__(
        self,
        config: Mapping[str, Any],
        data_folder: str,
        run_folder: str,
        ranking_threads: int,
        *,
        gpu: bool,
    ) -> None:
        """Raises `FindRecError` where the run folder cannot be seen. `ranking_threads` are those of a full
        ranking; a validation takes as many as a worker does. Without `gpu` those of this machine are left to
        the workers.
        """
        if not gpu:
            os.environ["CUDA_VISIBLE_DEVICES"] = ""
        self._config = parse_config(dict(config))
        self._run = Path(run_folder)
        if not (self._run / "config.yaml").is_file():
            raise FindRecError(
                f"the evaluator runs on {os.uname().nodename} and cannot see the run folder {run_folder} "
                "there. Set `runs` to a folder that all machines share, or evaluation.evaluator=inline"
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
        """Let the workers of this machine go first wherever they could run."""
        os.nice(_YIELDS)

    def work(self) -> bool:
        """Validate one checkpoint that is due, else rank one that has been trained to the end; False when
        there is neither.
        """
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
                mark, shards = self._mark(name), self._config.evaluation.shards
                self._known[name] = (mark, rank_scorers(self._run, self._folder, [name], shards=shards))
                return True
        return False

    def _validate(self, job: TrainingJob, path: Path) -> None:
        torch.set_num_threads(worker_threads(self._config))
        try:
            digest, state = checkpoint_digest(path), read_state(path)
            scorer = load_scorer(job, self._folder, self._device, checkpoint=path)
        except (FindRecError, OSError) as error:
            self._failures[str(path)] += 1
            if self._failures[str(path)] == _TRIES:
                say(f"WARNING: no validation of {job.name} at {path.name}: {error}")
            return
        shards = self._config.evaluation.shards
        with (
            ray_session(self._config) if shards else nullcontext(),
            sharded(scorer.items_Vd, self._run, shards) if shards else nullcontext() as spread,
        ):
            settings = ranking_settings(job.config, self._folder)
            ranks = rank_split(scorer, self._folder, "valid", **settings, shards=spread)
        row = validation_row(ranks, job.config, self._folder)
        if digest is None or digest != checkpoint_digest(path):
            return  # replaced meanwhile: due again
        values = {name: row[name] for name in METRICS}
        found = Validation(state.step, state.epoch, digest, values)
        record_validation(job.folder, found)
        self._mirror(job, found)
        say(f"  validation of {job.name}, epoch {state.epoch}: {describe_row(row)}")

    def _mirror(self, job: TrainingJob, found: Validation) -> None:
        """To MLflow; at first all there are, as an evaluator that was killed may have kept some to itself."""
        news = [found]
        if job.name not in self._trackers:
            self._trackers[job.name] = Tracker.join(job.config, job.folder)
            news = read_validations(job.folder)
        for one in news:
            self._trackers[job.name].log(one.step, one.logged)

    def _mark(self, name: str) -> str | None:
        """Which weights a result is of; None for a baseline that is not trained."""
        for job in training_jobs(self._config, self._run):
            if job.name == name and (best := best_checkpoint_path(checkpoint_folder(job.folder))) is not None:
                return checkpoint_digest(best)
        return None

    def finish(self) -> Rows:
        """`evaluate_run`, of which much may be done already; the metrics rows by split."""
        for tracker in self._trackers.values():
            tracker.finish()
        torch.set_num_threads(self._threads)
        known = {name: found for name, (mark, found) in self._known.items() if mark == self._mark(name)}
        return evaluate_run(self._run, known=known, show=False)


def _is_trained(job: TrainingJob) -> bool:
    """Whether a training is at its end, and its best checkpoint therefore known once nothing is due."""
    saved = [p for p in list_checkpoints(checkpoint_folder(job.folder)) if checkpoint_digest(p) is not None]
    return bool(saved) and read_state(saved[-1]).epoch >= job.config.training.epochs
