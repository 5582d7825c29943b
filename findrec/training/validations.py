"""Which checkpoint of a training is best, which are kept, and what an evaluator beside it has found.

Workers that validate note the best step in their checkpoints. An evaluator beside training
(`evaluation.evaluator=async`) needs nothing of them but the checkpoints: each that ends an epoch of
`training.eval_every` is due until it has a line in `validations.jsonl`. A line counts for the one checkpoint
it was made from, named by the digest of its manifest; a step trained and saved anew is due anew. So neither
the evaluator's speed nor a restart decides which checkpoint is best, as long as those due are kept.
"""

from __future__ import annotations

import shutil
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from pathlib import Path

from findrec.config import RunConfig
from findrec.datasets.manifest import sha256_file
from findrec.progress import say
from findrec.training.checkpoint import (
    MANIFEST,
    Checkpoint,
    TrainState,
    latest_checkpoint,
    list_checkpoints,
    load_checkpoint,
    read_state,
    verify_checkpoint,
)
from findrec.training.metrics_log import MetricsLog, read_lines

FILE = "validations.jsonl"
SELECTS = "ndcg@10"  # the metric a checkpoint is best by
METRICS = (SELECTS, "recall@10", "mrr")


@dataclass(frozen=True)
class Validation:
    """What the evaluator found of one checkpoint."""

    step: int
    epoch: int
    checkpoint: str  # its `checkpoint_digest`
    values: Mapping[str, float]

    @property
    def logged(self) -> dict[str, float]:
        """The values under the names that training logs them by."""
        return {f"valid/{name}": value for name, value in self.values.items()}


def checkpoint_digest(path: Path) -> str | None:
    """The sha256 of a checkpoint's manifest, which holds those of its files; None if it is not committed."""
    try:
        return sha256_file(path / MANIFEST)
    except FileNotFoundError:
        return None


def record_validation(training: Path, found: Validation) -> None:
    """Append a line to the file of a training's folder; one process does this."""
    log = MetricsLog(training, FILE)
    log.write(found.step, found.epoch, {"checkpoint": found.checkpoint, **found.values})
    log.close()


def read_validations(training: Path) -> list[Validation]:
    """The lines of a training's folder that count: of checkpoints that are there, or no longer are."""
    found = {
        line["step"]: Validation(
            line["step"], line["epoch"], line["checkpoint"], {name: line[name] for name in METRICS}
        )
        for line in read_lines(training / FILE)
    }
    root = training / "checkpoints"
    return [
        one
        for step, one in sorted(found.items())
        if checkpoint_digest(root / f"step-{step:08d}") in (None, one.checkpoint)
    ]


def is_due(config: RunConfig, state: TrainState) -> bool:
    """Whether a checkpoint is one to be validated: it ends an epoch that is."""
    training = config.training
    ends = state.epoch % training.eval_every == 0 or state.epoch == training.epochs
    return state.epoch > 0 and state.epoch_step == 0 and ends


def due_checkpoints(config: RunConfig, training: Path) -> list[Path]:
    """The committed checkpoints below a training's folder that an evaluator has yet to validate."""
    done = {found.checkpoint for found in read_validations(training)}
    return [
        path
        for path in list_checkpoints(training / "checkpoints")
        if (digest := checkpoint_digest(path)) is not None
        and digest not in done
        and is_due(config, read_state(path))
    ]


def best_checkpoint_path(root: Path) -> Path | None:
    """The checkpoint of the best validation; the newest one if the best is damaged or there is none."""
    newest = latest_checkpoint(root)
    if newest is None:
        return None
    best = _best_path(root, read_state(newest))
    if best is None or best == newest:
        return newest
    if (problem := verify_checkpoint(best)) is None:
        return best
    say(f"WARNING: the best checkpoint {best} is not used, the newest is: {problem}")
    return newest


def best_checkpoint(root: Path) -> Checkpoint | None:
    """`best_checkpoint_path`, loaded."""
    path = best_checkpoint_path(root)
    return None if path is None else load_checkpoint(path, verify=False)  # it was just verified


def _best_path(root: Path, state: TrainState) -> Path | None:
    """The best of what the workers noted and of what the evaluator found; of equals the earliest."""
    found = [(-state.best, state.best_step)] if state.best_step >= 0 else []
    for one in read_validations(root.parent):
        if checkpoint_digest(root / f"step-{one.step:08d}") is not None:
            found.append((-one.values[SELECTS], one.step))
    return root / f"step-{min(found)[1]:08d}" if found else None


def spared_checkpoints(config: RunConfig, root: Path, state: TrainState) -> set[str]:
    """Names of the checkpoints that `state` must not see deleted: the best one, those of every
    `training.keep_every`-th epoch and, with an evaluator beside training, those that are due.
    """
    best = _best_path(root, state)
    spared = set() if best is None else {best.name}
    if every := config.training.keep_every:
        saved = ((path.name, read_state(path)) for path in list_checkpoints(root) if checkpoint_digest(path))
        spared |= {name for name, then in saved if then.epoch_step == 0 and then.epoch % every == 0}
    if config.evaluation.evaluator == "async":
        spared |= {path.name for path in due_checkpoints(config, root.parent)}
    return spared


def prune_checkpoints(root: Path, *, keep: int, spare: Collection[str]) -> None:
    """Delete all but the newest `keep` checkpoints and those named in `spare`."""
    for path in list_checkpoints(root)[:-keep]:
        if path.name not in spare:
            # The manifest goes first, so that a folder half deleted is not trusted.
            (path / MANIFEST).unlink(missing_ok=True)
            shutil.rmtree(path, ignore_errors=True)
