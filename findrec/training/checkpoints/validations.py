"""Selects the best checkpoint, decides which checkpoints are kept, and stores asynchronous validations.

Workers that validate inline record the best step in their checkpoints. The asynchronous evaluator
(`evaluation.evaluator=async`) reads only the checkpoints: each one that ends an epoch of
`training.eval_every` is due until `validations.jsonl` has a line for it. A line refers to one checkpoint by
the digest of its manifest, so a step that is trained and saved again is due again. Due checkpoints are never
deleted, so neither the evaluator's speed nor a restart changes which checkpoint is best.
"""

from __future__ import annotations

import shutil
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from pathlib import Path

from findrec.config import RunConfig
from findrec.errors import FindRecError
from findrec.files import sha256_file
from findrec.progress import warn
from findrec.training.checkpoints.budget import is_out_of_time
from findrec.training.checkpoints.checkpoint import (
    Checkpoint,
    TrainState,
    checkpoint_folder,
    checkpoint_path,
    latest_checkpoint,
    list_checkpoints,
    load_checkpoint,
    read_state,
    verify_checkpoint,
)
from findrec.training.checkpoints.manifest import MANIFEST, STATE, check_files, outdated, read_entries
from findrec.training.checkpoints.store import CheckpointStore
from findrec.training.logs.metrics_log import MetricsLog, read_lines

FILE = "validations.jsonl"
SELECTS = "ndcg@10"  # the metric that selects the best checkpoint
METRICS = (SELECTS, "recall@10", "mrr")


@dataclass(frozen=True)
class Validation:
    """The validation metrics of one checkpoint."""

    step: int
    epoch: int
    checkpoint: str  # its `checkpoint_digest`
    values: Mapping[str, float]

    @property
    def logged(self) -> dict[str, float]:
        """The values under the names used in the training log."""
        return {f"valid/{name}": value for name, value in self.values.items()}


def checkpoint_digest(path: Path) -> str | None:
    """The sha256 of a checkpoint's manifest, which lists those of its files; None if not committed."""
    try:
        return sha256_file(path / MANIFEST)
    except FileNotFoundError:
        return None


def record_validation(training: Path, validation: Validation) -> None:
    """Append a line to `validations.jsonl` of a training's folder (called by one process)."""
    log = MetricsLog(training, FILE)
    log.write(validation.step, validation.epoch, {"checkpoint": validation.checkpoint, **validation.values})
    log.close()


def read_validations(training: Path) -> list[Validation]:
    """The validations of a training by step, without those of checkpoints that were saved again since."""
    validations = {
        line["step"]: Validation(
            line["step"], line["epoch"], line["checkpoint"], {name: line[name] for name in METRICS}
        )
        for line in read_lines(training / FILE)
        if isinstance(line.get("epoch"), int)
        and isinstance(line.get("checkpoint"), str)
        and all(isinstance(line.get(name), int | float) for name in METRICS)  # others are damaged
    }
    root = checkpoint_folder(training)
    return [
        validation
        for step, validation in sorted(validations.items())
        if checkpoint_digest(checkpoint_path(root, step)) in (None, validation.checkpoint)
    ]


def is_due(config: RunConfig, state: TrainState) -> bool:
    """Whether a checkpoint has to be validated: it ends the last epoch or one of `training.eval_every`."""
    training = config.training
    last = state.epoch == training.epochs or is_out_of_time(training, state)
    ends = last or state.epoch % training.eval_every == 0
    return config.model.ranked and state.epoch > 0 and state.epoch_step == 0 and ends


def due_checkpoints(config: RunConfig, training: Path) -> list[Path]:
    """The committed checkpoints of a training that the evaluator has yet to validate."""
    done = {validation.checkpoint for validation in read_validations(training)}
    return [
        path
        for path in list_checkpoints(checkpoint_folder(training))
        if (digest := checkpoint_digest(path)) is not None
        and digest not in done
        and (state := saved_state(path)) is not None
        and is_due(config, state)
    ]


def saved_state(path: Path) -> TrainState | None:
    """The state of a checkpoint whose other files are not verified; None if it is damaged."""
    try:
        entries = read_entries(path)
        return read_state(path) if check_files(path, {STATE: entries[STATE]}) is None else None
    except ValueError:  # also `FindRecError`
        return None


def best_checkpoint_path(root: Path) -> Path | None:
    """The checkpoint with the best validation, or the newest one if that is damaged or none was validated."""
    newest = latest_checkpoint(root)
    if newest is None:
        return None
    best = _best_path(root, read_state(newest))
    if best is None or best == newest:
        return newest
    if (problem := verify_checkpoint(best)) is None:
        return best
    warn(f"WARNING: the best checkpoint {best} is not used, the newest is: {problem}")
    return newest


def find_artifacts(config: RunConfig, needs: Mapping[str, Path]) -> dict[str, Path]:
    """The best checkpoints of the trainings that another one needs, by name; `needs` are their folders.

    Where the run has a checkpoint store, checkpoints that this machine lacks are downloaded. Raises
    `FindRecError` for a training without a usable checkpoint.
    """
    artifacts = {}
    for name, training in needs.items():
        checkpoints = checkpoint_folder(training)
        if (store := CheckpointStore.of(config, checkpoints)) is not None:
            store.fetch_best(checkpoints)
        path = best_checkpoint_path(checkpoints)
        if path is None:
            raise FindRecError(f"the stage {name!r} that is needed has no usable checkpoint in {training}")
        artifacts[name] = path
    return artifacts


def best_checkpoint(root: Path) -> Checkpoint | None:
    """`best_checkpoint_path`, loaded."""
    path = best_checkpoint_path(root)
    return None if path is None else load_checkpoint(path, verify=False)  # it was just verified


def _best_path(root: Path, state: TrainState) -> Path | None:
    """The best checkpoint by inline and asynchronous validations; the earliest one of equals."""
    candidates = [(-state.best, state.best_step)] if state.best_step >= 0 else []
    for validation in read_validations(root.parent):
        if checkpoint_digest(checkpoint_path(root, validation.step)) is not None:
            candidates.append((-validation.values[SELECTS], validation.step))
    return checkpoint_path(root, min(candidates)[1]) if candidates else None


def protected_checkpoints(config: RunConfig, root: Path, state: TrainState) -> set[str]:
    """Names of the checkpoints that must not be deleted at `state`.

    These are the best one, those of every `training.keep_every`-th epoch and, with the asynchronous
    evaluator, those that are due.
    """
    best = _best_path(root, state)
    protected = set() if best is None else {best.name}
    if every := config.training.keep_every:
        committed = (path for path in list_checkpoints(root) if checkpoint_digest(path))
        states = ((path.name, saved_state(path)) for path in committed)
        protected |= {name for name, s in states if s and s.epoch_step == 0 and s.epoch % every == 0}
    if config.evaluation.evaluator == "async":
        protected |= {path.name for path in due_checkpoints(config, root.parent)}
    return protected


def prune_checkpoints(root: Path, step: int, *, keep: int, protected: Collection[str]) -> None:
    """Delete the checkpoints that are `outdated` at `step`."""
    names = [path.name for path in list_checkpoints(root)]
    for name in outdated(names, step, keep=keep, protected=protected):
        # The manifest is deleted first, so that a partly deleted folder is not valid.
        (root / name / MANIFEST).unlink(missing_ok=True)
        shutil.rmtree(root / name, ignore_errors=True)
