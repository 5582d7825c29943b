"""The training loop: load, then for each planned step run this worker's microbatches, update, log; after each
epoch validate and save.

All state that resuming needs is the number of steps done, in all and of the epoch; batches, dropout, noise
and negatives follow from it (the epoch plan and `microbatch_seed`), so the same run comes out whatever the
number of workers, and wherever it was cut short.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from contextlib import ExitStack
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Protocol

from findrec.config import RunConfig
from findrec.datasets.batch import Batch
from findrec.datasets.batches import TrainLoader
from findrec.datasets.folder import DataFolder
from findrec.datasets.plan import Windows, plan_epoch
from findrec.datasets.splits import Int64Array
from findrec.progress import Bar, progress
from findrec.tables.base import Table
from findrec.training.alarms import Alarms
from findrec.training.build import build_catalogue, build_windows
from findrec.training.checkpoint import TrainState
from findrec.training.keeper import Keeper
from findrec.training.memory import memory_values
from findrec.training.objectives import microbatch_loss, microbatch_seed
from findrec.training.resume import plan_digest, restore
from findrec.training.schedule import learning_rate
from findrec.training.step_trace import StepTrace
from findrec.training.step_values import refuse_not_finite, sum_over_workers
from findrec.training.tower import Tower
from findrec.training.validation import validate
from findrec.training.validations import METRICS, SELECTS, is_due
from findrec.training.worker import StopRequested, Worker


class StepLog(Protocol):
    """Takes the metrics of a step (rank 0 only)."""

    def log(self, step: int, epoch: int, values: Mapping[str, float]) -> None:
        """Record `values` at `step`."""


def run_training(
    config: RunConfig,
    folder: DataFolder,
    checkpoints: Path,
    tower: Tower,
    table: Table,
    *,
    worker: Worker,
    log: StepLog | None = None,
    on_start: Callable[[TrainState], None] | None = None,
    after_epoch: Callable[[dict[str, float]], None] | None = None,
) -> TrainState:
    """Train to the end, from the newest checkpoint in `checkpoints`, else from the run that
    `training.warm_start` names, else from the start.

    `on_start(state)` is called on rank 0 before anything is logged; `after_epoch(metrics)` on every rank.
    Raises `StopRequested` when a worker's `pulse` was asked to stop, `DivergedError` on values not finite.
    """
    training = config.training
    windows = build_windows(config, folder)
    state = restore(config, folder, checkpoints, tower, table, plan_digest(config, folder, windows))
    if worker.leads and on_start is not None:
        on_start(state)
    left = int(windows.targets.sum()) * (training.epochs - state.epoch) - state.epoch_targets
    num_traced = training.profile_steps if worker.leads else 0
    with (
        ExitStack() as stack,
        progress(config.model.name, left, "targets", show=worker.leads) as bar,
        StepTrace(checkpoints.parent, num_traced, worker.device) as trace,
    ):
        run = _Run(config, folder, windows, checkpoints, tower, table, worker, log, bar, trace)
        stack.callback(run.keeper.close)
        while state.epoch < training.epochs and not _out_of_patience(config, state):
            state, values = run.epoch(state)
            due = is_due(config, state)
            if due and config.evaluation.evaluator == "inline":
                with worker.pulse.busy("validating"):
                    metrics = validate(config, folder, tower, table, run.catalogue, worker)
                state = _judge(state, metrics[SELECTS])
                found = {f"valid/{name}": metrics[name] for name in METRICS}
                values |= found
                bar.note(valid_ndcg=f"{metrics[SELECTS]:.4f}")
                run.write(state.step, state.epoch, found)
                due = state.best_step == state.step  # to be saved
            ends = state.epoch == training.epochs or _out_of_patience(config, state)
            saved = False
            if state.epoch % training.save_every == 0 or due or ends or run.stop:
                saved = run.keeper.save(state, must=ends, wait=run.stop)
            if after_epoch is not None:
                after_epoch(values)
            if run.stop and not ends:
                raise StopRequested(state.step, saved=saved)
    return state


def _judge(state: TrainState, ndcg: float) -> TrainState:
    """The state after a validation: a new best, or one more without."""
    if ndcg > state.best:
        return replace(state, best=ndcg, best_step=state.step, stale=0)
    return replace(state, stale=state.stale + 1)


class _Run:
    """One training on one worker: its parts, and what is done with them epoch by epoch and step by step."""

    def __init__(
        self,
        config: RunConfig,
        folder: DataFolder,
        windows: Windows,
        checkpoints: Path,
        tower: Tower,
        table: Table,
        worker: Worker,
        log: StepLog | None,
        bar: Bar,
        trace: StepTrace,
    ) -> None:
        self.trace = trace
        self.config, self.folder, self.windows = config, folder, windows
        self.tower, self.table, self.worker, self.log, self.bar = tower, table, worker, log, bar
        self.catalogue = build_catalogue(config, folder)
        self.alarms = Alarms()
        self.keeper = Keeper(config, checkpoints, tower, table, worker)
        self.stop = False  # somebody asked for it

    def epoch(self, state: TrainState) -> tuple[TrainState, dict[str, float]]:
        """Train what is left of an epoch; the state after it and the epoch's values."""
        config, worker, bar = self.config, self.worker, self.bar
        training = config.training
        plan = plan_epoch(
            self.windows,
            seed=training.seed,
            epoch=state.epoch,
            microbatches=training.microbatches,
            tokens=training.tokens,
        )
        num_steps = training.epochs * len(plan.steps)  # epochs may differ by a step; only the rate uses it
        loader = TrainLoader(
            self.folder,
            self.windows,
            plan,
            rank=worker.rank,
            world=worker.world,
            first_step=state.epoch_step,
            tie_seed=microbatch_seed(training.seed, state.epoch, -1) if config.data.shuffle_ties else None,
        )
        self.tower.model.train()
        seconds_trained = seconds_waited = targets_here = 0.0
        mark = time.perf_counter()
        with loader:
            for index, microbatches in loader:
                waited = time.perf_counter() - mark
                num_targets = int(plan.targets[index])
                values = self._step(state, num_steps, num_targets, microbatches, plan.steps[index])
                now = time.perf_counter()
                seconds, mark = now - mark, now
                values |= {
                    "train/targets_per_s": num_targets / seconds,
                    "train/data_wait_share": waited / seconds,
                }
                state = replace(
                    state,
                    step=state.step + 1,
                    epoch_step=index + 1,
                    epoch_loss=state.epoch_loss + values["train/loss"] * num_targets,
                    epoch_targets=state.epoch_targets + num_targets,
                )
                seconds_trained, seconds_waited = seconds_trained + seconds, seconds_waited + waited
                targets_here += num_targets
                worker.pulse.tick(state.step)
                bar.advance(num_targets)
                bar.note(
                    epoch=f"{state.epoch + 1}/{training.epochs}",
                    loss=f"{values['train/loss']:.4f}",
                    data_wait=f"{seconds_waited / seconds_trained:.1%}",
                )
                if worker.leads:
                    self.alarms.check(state.step, values)
                self.write(state.step, state.epoch, values)
                self.trace.done(state.step)
                if index + 1 == len(plan.steps):
                    continue  # an epoch's end is saved after its validation
                if self.stop:
                    raise StopRequested(state.step, saved=self.keeper.save(state, wait=True))
                if training.save_steps > 0 and state.step % training.save_steps == 0:
                    self.keeper.save(state)
        epoch_values = {
            "train/epoch_loss": state.epoch_loss / state.epoch_targets,
            "train/epoch_targets_per_s": targets_here / seconds_trained,
            "train/padding": plan.padding,
            **memory_values(worker),
        }
        self.write(state.step, state.epoch, epoch_values)
        state = replace(state, epoch=state.epoch + 1, epoch_step=0, epoch_loss=0.0, epoch_targets=0)
        return state, epoch_values

    def _step(
        self,
        state: TrainState,
        num_steps: int,
        num_targets: int,
        microbatches: list[tuple[int, Batch]],
        chosen: list[Int64Array],
    ) -> dict[str, float]:
        """This worker's microbatches of a step, then the update; the values of the whole step.

        `chosen` are the windows of all microbatches, to name those that go wrong.
        """
        config, training = self.config, self.config.training
        every = config.model.align.diagnose_every
        self.tower.model.diagnosing = every > 0 and state.step % every == 0
        shares = {}
        for microbatch, batch in microbatches:
            shares[microbatch] = microbatch_loss(
                self.tower,
                self.table,
                batch.to(self.worker.device),
                self.catalogue,
                num_targets=num_targets,
                num_microbatches=training.microbatches,
                seed=microbatch_seed(training.seed, state.step, microbatch),
            )
            self.worker.pulse.tick()
        found = sum_over_workers(shares, training.microbatches, self.worker)
        self.stop |= found.stop
        refuse = partial(
            refuse_not_finite,
            found,
            step=state.step,
            epoch=state.epoch,
            chosen=chosen,
            windows=self.windows,
            folder=self.folder,
        )
        refuse({})
        rate = learning_rate(state.step, num_steps, training.optim)
        norms = {"grad_norm/tower": self.tower.step(rate), "grad_norm/table": self.table.step(rate)}
        refuse(norms)
        return found.values | norms | {"train/lr": rate}

    def write(self, step: int, epoch: int, values: Mapping[str, float]) -> None:
        """Log values (rank 0)."""
        if self.worker.leads and self.log is not None:
            self.log.log(step, epoch, values)


def _out_of_patience(config: RunConfig, state: TrainState) -> bool:
    return 0 < config.training.patience <= state.stale
