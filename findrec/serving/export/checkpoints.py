"""Copies the best checkpoints of a run and of the stages its model reads, without optimizer state."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

from findrec.config import RunConfig
from findrec.errors import FindRecError
from findrec.tables.base import ITEMS
from findrec.training.checkpoints.checkpoint import (
    checkpoint_folder,
    load_checkpoint,
    save_checkpoint,
)
from findrec.training.checkpoints.store import CheckpointStore
from findrec.training.checkpoints.validations import best_checkpoint_path
from findrec.training.runs import TrainingJob, main_job, training_jobs


def copy_checkpoints(config: RunConfig, run_folder: Path, target: Path, *, without_users: int) -> Path:
    """Copy the checkpoints that the run's model needs to the same places in `target`.

    Tables with a row for each of `without_users` users (0: none) are left out, as such a row tells about its
    user.

    Returns the folder of the copy of the model's own. Raises `FindRecError` if one is missing or damaged.
    """
    job = main_job(config, run_folder)
    by_folder = {other.folder: other for other in training_jobs(config, run_folder)}
    waiting, done = [job], set()
    while waiting:
        current = waiting.pop()
        if current.folder not in done:
            done.add(current.folder)
            copied = _copy(current, target / current.folder.relative_to(run_folder), without_users)
            if current is job:
                own = copied
            waiting += [by_folder[folder] for folder in current.needs.values()]
    return own


def _copy(job: TrainingJob, target: Path, without_users: int) -> Path:
    checkpoints = checkpoint_folder(job.folder)
    if (store := CheckpointStore.of(job.config, checkpoints)) is not None:
        store.fetch_best(checkpoints)
    best = best_checkpoint_path(checkpoints)
    if best is None:
        raise FindRecError(f"{job.folder} has no usable checkpoint: train it first")
    saved = load_checkpoint(best, verify=False)  # it was just verified
    # The copy is the only checkpoint, so it is the best one.
    state = replace(saved.state, best_step=saved.state.step, started_from="")
    return save_checkpoint(
        checkpoint_folder(target),
        state,
        tower=saved.tower,
        optimizer_state={},
        tables={
            name: {"weight": table["weight"]}
            for name, table in saved.tables.items()
            if name == ITEMS or not without_users or table.num_rows != without_users + 1
        },
    )
