"""Trains one trial in a process of Ray Tune."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch

from findrec.config import RunConfig
from findrec.datasets.folder.data_folder import DataFolder
from findrec.errors import DivergedError
from findrec.evaluation.validation import validate
from findrec.ops.precision import allow_tf32
from findrec.ray_session import worker_threads
from findrec.training.allocator import keep_freed_memory
from findrec.training.build import build_tables, build_tower_model
from findrec.training.checkpoints.checkpoint import TrainState, checkpoint_folder
from findrec.training.checkpoints.validations import SELECTS, find_artifacts
from findrec.training.logs.metrics_log import MetricsLog
from findrec.training.loop import run_training
from findrec.training.runs import TrainingJob, only_training_of, open_run_folder, run_folder, training_jobs
from findrec.training.tower import PlainTower
from findrec.training.worker import Worker
from findrec.tuning.trials import read_ended, trial_config, write_trial

VALUE, EPOCH = SELECTS, "epoch"  # what a trial reports
Report = Callable[[dict[str, float]], None]


def run_trial(values: Mapping[str, Any], *, tree: dict[str, Any], data: str, tuning: str) -> None:
    """The trainable of Ray Tune: train a trial of the configuration `tree` on the data folder `data`.

    It reports the best validation metric so far after every validation of the model itself, not of its
    earlier stages. Training that diverges ends the trial with what it has reached, 0 if nothing.

    Optuna may propose the same values again, also while they are being trained. The second trial waits for
    the first one and reports the same.
    """
    from ray import tune

    config = trial_config(tree, values, Path(tuning))
    folder, progress = run_folder(config), _Progress(tune.report)
    with only_training_of(config, wait=True):
        ended = read_ended(folder)
        if ended in (None, "failed"):
            open_run_folder(config)
            write_trial(folder, values)
            ended = _train_stages(config, folder, data, progress)
            write_trial(folder, values, ended)
        else:
            progress.read(MetricsLog(folder))
        if ended == "diverged":
            progress.validated(progress.epoch + 1, 0.0)


def _train_stages(config: RunConfig, folder: Path, data: str, progress: _Progress) -> str:
    """Train a trial; returns how it ended."""
    import ray

    keep_freed_memory()
    torch.set_num_threads(worker_threads(config))
    device = torch.device("cuda" if ray.get_gpu_ids() else "cpu")
    opened = DataFolder.open(data, verify=False, cache_bytes=config.data.cache_bytes)
    try:
        for job in training_jobs(config, folder):
            _train(job, opened, device, progress if job.folder == folder else None)
    except DivergedError:
        return "diverged"
    return "trained"


class _Progress:
    """The best validation metric of a trial, reported once for each validation."""

    def __init__(self, report: Report) -> None:
        self._report = report
        self.best, self.epoch = -1.0, 0

    def validated(self, epoch: int, value: float) -> None:
        """Report a validation; one of an epoch that was reported before is ignored."""
        if epoch > self.epoch:
            self.best, self.epoch = max(self.best, value), epoch
            self._report({VALUE: self.best, EPOCH: epoch})

    def read(self, log: MetricsLog) -> None:
        """Report the validations in a log."""
        for line in log.read():
            if (value := line.get(f"valid/{VALUE}")) is not None:
                self.validated(int(line["epoch"]), float(value))


def _train(job: TrainingJob, folder: DataFolder, device: torch.device, progress: _Progress | None) -> None:
    config: RunConfig = job.config
    torch.manual_seed(config.training.seed)
    if device.type == "cuda":
        allow_tf32(config.training.precision == "bfloat16")
    artifacts = find_artifacts(config, job.needs)
    model = build_tower_model(config, folder, artifacts)
    tables = build_tables(config, folder, device)
    log = MetricsLog(job.folder)

    def started(state: TrainState) -> None:
        log.truncate_after(state.step)
        validations()  # of before an interruption

    def validations(_: object = None) -> None:
        if progress is not None:
            progress.read(log)

    run_training(
        config,
        folder,
        checkpoint_folder(job.folder),
        PlainTower(model.to(device), config.training.optim),
        tables,
        worker=Worker(device=device),
        validate=validate,
        log=_Log(log),
        on_start=started,
        after_epoch=validations,  # after the checkpoint of the epoch was saved
        earlier=None if job.continues is None else artifacts[job.continues],
    )


class _Log:
    def __init__(self, log: MetricsLog) -> None:
        self._log = log

    def log(self, step: int, epoch: int, values: Mapping[str, float]) -> None:
        self._log.write(step, epoch, values)
