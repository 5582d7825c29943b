"""The training loop: run the microbatches of each planned step, update, log; validate and save after epochs.

Resuming needs only the numbers of completed steps, in total and of the epoch. Batches, dropout, noise and
negatives follow from them (by the epoch plan and `microbatch_seed`), so results do not depend on the number
of workers or on interruptions.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from contextlib import ExitStack
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any, Protocol

from findrec.config import RunConfig
from findrec.datasets.batches.catalogue import Catalogue, ItemFeatures
from findrec.datasets.batches.examples import ExampleLoader, ExampleSource
from findrec.datasets.batches.plan import microbatch_seed
from findrec.datasets.batches.read_ahead import Prepared, ReadAhead
from findrec.datasets.folder.data_folder import DataFolder
from findrec.datasets.folder.splits import Int64Array
from findrec.devices import is_cpu
from findrec.models.base import Microbatch
from findrec.progress import Bar, progress
from findrec.tables.base import ITEMS, Table
from findrec.training.build import build_catalogue
from findrec.training.checkpoints.budget import is_over
from findrec.training.checkpoints.checkpoint import TrainState
from findrec.training.checkpoints.manager import CheckpointManager
from findrec.training.checkpoints.validations import METRICS, SELECTS, is_due
from findrec.training.logs.one_time_warnings import OneTimeWarnings
from findrec.training.logs.step_trace import StepTrace
from findrec.training.memory import memory_values
from findrec.training.objectives import run_microbatch
from findrec.training.resume import plan_digest, restore
from findrec.training.schedule import learning_rate
from findrec.training.step_values import check_finite, sum_over_workers
from findrec.training.tower import Tower
from findrec.training.worker import StopRequested, Worker, largest_of_workers


class StepLog(Protocol):
    """Receives the metrics of steps (rank 0 only)."""

    def log(self, step: int, epoch: int, values: Mapping[str, float]) -> None:
        """Record `values` at `step`."""


class Validate(Protocol):
    """Ranks the validation targets with the current weights (a collective call)."""

    def __call__(
        self,
        config: RunConfig,
        folder: DataFolder,
        tower: Tower,
        tables: Mapping[str, Table],
        catalogue: Catalogue,
        worker: Worker,
    ) -> Mapping[str, float]:
        """The metrics, equal on every worker, including those in `validations.METRICS`."""


def run_training(
    config: RunConfig,
    folder: DataFolder,
    checkpoints: Path,
    tower: Tower,
    tables: Mapping[str, Table],
    *,
    worker: Worker,
    validate: Validate,
    log: StepLog | None = None,
    on_start: Callable[[TrainState], None] | None = None,
    after_epoch: Callable[[dict[str, float]], None] | None = None,
    earlier: Path | None = None,
) -> TrainState:
    """Train to the end, from the newest checkpoint, else from `training.warm_start`, else from scratch.

    `earlier` is the checkpoint of an earlier stage to start from instead of from scratch.
    `on_start(state)` is called on rank 0 before anything is logged; `after_epoch(metrics)` on every rank.

    Raises:
        StopRequested: if the `heartbeat` of a worker has a stop request.
        DivergedError: if losses or gradients are not finite.
    """
    training = config.training
    source: ExampleSource[Any] = tower.model.examples(config, folder)
    state = restore(config, folder, checkpoints, tower, tables, plan_digest(config, folder, source), earlier)
    if worker.is_rank_zero and on_start is not None:
        on_start(state)
    left = source.num_targets * (training.epochs - state.epoch) - state.epoch_targets
    num_traced = training.profile_steps if worker.is_rank_zero else 0
    with (
        ExitStack() as stack,
        progress(config.model.title, left, "targets", show=worker.is_rank_zero) as bar,
        StepTrace(checkpoints.parent, num_traced, worker.device) as trace,
    ):
        run = _Run(config, folder, source, checkpoints, tower, tables, worker, log, bar, trace)
        stack.callback(run.checkpoint_manager.close)
        run.checkpoint_manager.delete_old(state)
        # An epoch that has begun is completed before the time is looked at.
        while state.epoch_step or not is_over(training, state):
            state, values = run.epoch(state)
            due = is_due(config, state)
            if due and config.evaluation.evaluator == "inline":
                with worker.heartbeat.busy("validating"):
                    metrics = validate(config, folder, tower, tables, run.catalogue, worker)
                state = _update_best(state, metrics[SELECTS])
                validation = {f"valid/{name}": metrics[name] for name in METRICS}
                values |= validation
                bar.note(valid_ndcg=f"{metrics[SELECTS]:.4f}")
                run.write(state.step, state.epoch, validation)
                due = state.best_step == state.step  # to be saved
            ends = is_over(training, state)
            saved = False
            if state.epoch % training.save_every == 0 or due or ends or run.stop:
                saved = run.checkpoint_manager.save(state, must=ends, wait=run.stop)
            if after_epoch is not None:
                after_epoch(values)
            if run.stop and not ends:
                raise StopRequested(state.step, saved=saved)
    return state


def _update_best(state: TrainState, ndcg: float) -> TrainState:
    """The state after a validation."""
    if ndcg > state.best:
        return replace(state, best=ndcg, best_step=state.step, stale=0)
    return replace(state, stale=state.stale + 1)


class _Run:
    """One training on one worker: its components, and the work of an epoch and of a step."""

    def __init__(
        self,
        config: RunConfig,
        folder: DataFolder,
        source: ExampleSource[Any],
        checkpoints: Path,
        tower: Tower,
        tables: Mapping[str, Table],
        worker: Worker,
        log: StepLog | None,
        bar: Bar,
        trace: StepTrace,
    ) -> None:
        self.trace = trace
        self.config, self.source = config, source
        self.tower, self.tables, self.worker, self.log, self.bar = tower, tables, worker, log, bar
        self.catalogue = build_catalogue(config, folder)
        self.warnings = OneTimeWarnings()
        self.checkpoint_manager = CheckpointManager(config, checkpoints, tower, tables, worker)
        self.stop = False  # whether a stop was requested
        self.prepare: Callable[[Any], Prepared] | None = None
        self.features_stay = is_cpu(worker.device)  # or are copied to a GPU
        if not is_cpu(worker.device):
            self.prepare = ReadAhead(self.catalogue, worker.device)

    def epoch(self, state: TrainState) -> tuple[TrainState, dict[str, float]]:
        """Train the rest of an epoch; returns the state after it and the values of the epoch."""
        config, worker, bar = self.config, self.worker, self.bar
        training = config.training
        plan = self.source.plan(state.epoch)
        num_steps = training.epochs * len(plan.steps)  # for the learning rate only: epochs may differ
        loader = ExampleLoader(
            self.source,
            plan,
            epoch=state.epoch,
            rank=worker.rank,
            world=worker.world,
            first_step=state.epoch_step,
            prepare=self.prepare,
        )
        self.tower.model.train()
        train_seconds = wait_seconds = num_trained = 0.0
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
                    "train/targets": num_targets,
                    "train/seconds": seconds,
                }
                state = replace(
                    state,
                    step=state.step + 1,
                    epoch_step=index + 1,
                    epoch_loss=state.epoch_loss + values["train/loss"] * num_targets,
                    epoch_targets=state.epoch_targets + num_targets,
                    seconds=0.0 if training.max_seconds is None else state.seconds + seconds,
                )
                train_seconds, wait_seconds = train_seconds + seconds, wait_seconds + waited
                num_trained += num_targets
                worker.heartbeat.tick(state.step)
                bar.advance(num_targets)
                bar.note(
                    epoch=f"{state.epoch + 1}/{training.epochs}",
                    loss=f"{values['train/loss']:.4f}",
                    data_wait=f"{wait_seconds / train_seconds:.1%}",
                )
                if worker.is_rank_zero:
                    self.warnings.show(state.step, self.tower.model.warnings(values))
                self.write(state.step, state.epoch, values)
                self.trace.done(state.step)
                if index + 1 == len(plan.steps):
                    continue  # the end of an epoch is saved after its validation
                if self.stop:
                    raise StopRequested(state.step, saved=self.checkpoint_manager.save(state, wait=True))
                if training.save_steps > 0 and state.step % training.save_steps == 0:
                    self.checkpoint_manager.save(state)
        epoch_values = {
            "train/epoch_loss": state.epoch_loss / state.epoch_targets,
            "train/epoch_targets_per_s": num_trained / train_seconds,
            "train/padding": plan.padding,
            **memory_values(worker),
        }
        self.write(state.step, state.epoch, epoch_values)
        state = replace(state, epoch=state.epoch + 1, epoch_step=0, epoch_loss=0.0, epoch_targets=0)
        if training.max_seconds is not None:
            # Clocks differ between workers; all must decide alike whether time is left.
            (seconds,) = largest_of_workers([state.seconds], worker, "time in steps")
            state = replace(state, seconds=seconds)
        return state, epoch_values

    def _step(
        self,
        state: TrainState,
        num_steps: int,
        num_targets: int,
        microbatches: list[tuple[int, Any]],
        planned: list[Int64Array],
    ) -> dict[str, float]:
        """Run this worker's microbatches of a step and update; returns the values of the whole step.

        `planned` are the examples of all microbatches, for error messages.
        """
        training = self.config.training
        self.tower.model.start_step(state.step)
        shares = {}
        for index, examples in microbatches:
            microbatch = Microbatch(
                *self._on_device(examples),
                num_targets=num_targets,
                num_microbatches=training.microbatches,
                seed=microbatch_seed(training.seed, state.step, index),
            )
            shares[index] = run_microbatch(self.tower, self.tables, microbatch)
            self.worker.heartbeat.tick()
        reduced = sum_over_workers(shares, training.microbatches, self.worker)
        self.stop |= reduced.stop
        check = partial(
            check_finite,
            reduced,
            step=state.step,
            epoch=state.epoch,
            examples=planned,
            describe=self.source.describe,
        )
        check({})
        rate = learning_rate(state.step, num_steps, training.optim)
        norms = {"grad_norm/tower": self.tower.step(rate)}
        for name, table in self.tables.items():
            norms["grad_norm/table" if name == ITEMS else f"grad_norm/{name}"] = table.step(rate)
        check(norms)
        if not self.features_stay:
            # After a step, what the GPU has free is more than a step takes.
            self.catalogue.keep_on(self.worker.device)
            self.features_stay = True
        return reduced.values | norms | {"train/lr": rate}

    def _on_device(self, examples: Any) -> tuple[Any, ItemFeatures]:
        """The examples of a microbatch on the worker's device, and the features of items."""
        if isinstance(examples, Prepared):
            return examples.to(self.worker.device)
        return examples.to(self.worker.device), self.catalogue

    def write(self, step: int, epoch: int, values: Mapping[str, float]) -> None:
        """Log values (rank 0)."""
        if self.worker.is_rank_zero and self.log is not None:
            self.log.log(step, epoch, values)
