"""Decides when a training is over: by its epochs, its patience or its time."""

from __future__ import annotations

from findrec.config import TrainingConfig
from findrec.training.checkpoints.checkpoint import TrainState


def is_over(training: TrainingConfig, state: TrainState) -> bool:
    """Whether a training ends at `state`, which is that of a completed epoch."""
    return (
        state.epoch >= training.epochs
        or 0 < training.patience <= state.stale
        or is_out_of_time(training, state)
    )


def is_out_of_time(training: TrainingConfig, state: TrainState) -> bool:
    """Whether a training has had `training.max_seconds` of time in steps."""
    return training.max_seconds is not None and state.seconds >= training.max_seconds
