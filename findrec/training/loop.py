"""The training loop: load, then for each planned step run this worker's microbatches, update, log; after each
epoch validate and save.

All state that resuming needs is the number of steps done; batches, dropout, noise and negatives follow from
it (the epoch plan and `microbatch_seed`), so the same run comes out whatever the number of workers.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Protocol

import torch
import torch.distributed as dist

from findrec.config import RunConfig
from findrec.datasets.batches import TrainLoader
from findrec.datasets.catalogue import Catalogue
from findrec.datasets.folder import DataFolder
from findrec.datasets.plan import Windows, cut_prefixes, cut_windows, plan_epoch
from findrec.errors import DivergedError
from findrec.progress import Bar, progress
from findrec.tables.item_table import ItemTable
from findrec.training.alarms import Alarms
from findrec.training.build import build_catalogue
from findrec.training.checkpoint import TrainState, prune_checkpoints, save_checkpoint
from findrec.training.objectives import MicrobatchLoss, microbatch_loss, microbatch_seed
from findrec.training.resume import plan_digest, restore
from findrec.training.schedule import learning_rate
from findrec.training.tower import Tower
from findrec.training.validation import validate
from findrec.training.worker import Worker


class StepLog(Protocol):
    """Takes the metrics of a step (rank 0 only)."""

    def log(self, step: int, epoch: int, values: Mapping[str, float]) -> None:
        """Record `values` at `step`."""


def run_training(
    config: RunConfig,
    folder: DataFolder,
    checkpoints: Path,
    tower: Tower,
    table: ItemTable,
    *,
    worker: Worker,
    log: StepLog | None = None,
    on_resume: Callable[[int], None] | None = None,
    after_epoch: Callable[[dict[str, float]], None] | None = None,
) -> TrainState:
    """Train to the end, from the newest checkpoint in `checkpoints` or from the start.

    `on_resume(step)` is called on rank 0 before anything is logged; `after_epoch(metrics)` on every rank.
    """
    training = config.training
    if training.objective == "all":
        windows = cut_windows(folder, config.data.max_length, config.data.overlap)
    else:
        windows = cut_prefixes(folder, config.data.max_length)
    catalogue = build_catalogue(config, folder)
    state = restore(checkpoints, tower, table, plan_digest(config, folder, windows))
    if worker.leads and on_resume is not None:
        on_resume(state.step)
    alarms = Alarms()
    left = int(windows.targets.sum()) * (training.epochs - state.epoch)
    with progress(config.model.name, left, "targets", show=worker.leads) as bar:
        while state.epoch < training.epochs and not _out_of_patience(config, state):
            state, values = _run_epoch(
                config, folder, windows, tower, table, state, catalogue, worker, log, bar, alarms
            )
            ends = state.epoch == training.epochs
            if state.epoch % training.eval_every == 0 or ends:
                metrics = validate(config, folder, tower, table, catalogue, worker)
                state = _judge(state, metrics["ndcg@10"])
                found = {f"valid/{name}": metrics[name] for name in ("ndcg@10", "recall@10", "mrr")}
                values |= found
                bar.note(valid_ndcg=f"{metrics['ndcg@10']:.4f}")
                if worker.leads and log is not None:
                    log.log(state.step, state.epoch, found)
            ends = ends or _out_of_patience(config, state)
            if state.epoch % training.save_every == 0 or state.best_step == state.step or ends:
                moments = tower.moments()  # a collective: every rank takes part
                if worker.leads:
                    weights = tower.model.state_dict()
                    save_checkpoint(checkpoints, state, tower=weights, moments=moments, table=table.state())
                    prune_checkpoints(checkpoints, keep=training.keep, best_step=state.best_step)
            if after_epoch is not None:
                after_epoch(values)
    return state


def _judge(state: TrainState, ndcg: float) -> TrainState:
    """The state after a validation: a new best, or one more without."""
    if ndcg > state.best:
        return replace(state, best=ndcg, best_step=state.step, stale=0)
    return replace(state, stale=state.stale + 1)


def _run_epoch(
    config: RunConfig,
    folder: DataFolder,
    windows: Windows,
    tower: Tower,
    table: ItemTable,
    state: TrainState,
    catalogue: Catalogue,
    worker: Worker,
    log: StepLog | None,
    bar: Bar,
    alarms: Alarms,
) -> tuple[TrainState, dict[str, float]]:
    training = config.training
    plan = plan_epoch(
        windows,
        seed=training.seed,
        epoch=state.epoch,
        microbatches=training.microbatches,
        tokens=training.tokens,
    )
    num_steps = training.epochs * len(plan.steps)  # epochs may differ by a step; only the rate uses it
    ties = microbatch_seed(training.seed, state.epoch, -1) if config.data.shuffle_ties else None
    loader = TrainLoader(folder, windows, plan, rank=worker.rank, world=worker.world, tie_seed=ties)
    tower.model.train()
    sums = dict.fromkeys(("loss", "targets", "seconds", "waited"), 0.0)
    mark = time.perf_counter()
    step = state.step
    with loader:
        for index, microbatches in loader:
            waited = time.perf_counter() - mark
            num_targets = int(plan.targets[index])
            shares = []
            every = config.model.align.diagnose_every
            tower.model.diagnosing = every > 0 and step % every == 0
            for microbatch, batch in microbatches:
                batch = batch.to(worker.device)
                share = microbatch_loss(
                    tower,
                    table,
                    batch,
                    catalogue,
                    num_targets=num_targets,
                    num_microbatches=training.microbatches,
                    seed=microbatch_seed(training.seed, step, microbatch),
                )
                shares.append(share)
            values = _sum_over_workers(shares, worker)
            _refuse_nan(values, step, state.epoch)
            rate = learning_rate(step, num_steps, training.optim)
            table.reduce_gradient()
            values["grad_norm/tower"] = tower.step(rate)
            values["grad_norm/table"] = table.step(rate)
            step += 1
            now = time.perf_counter()
            seconds, mark = now - mark, now
            values |= {"train/lr": rate, "train/targets_per_s": num_targets / seconds}
            values["train/data_wait_share"] = waited / seconds
            sums["loss"] += values["train/loss"] * num_targets
            sums["targets"] += num_targets
            sums["seconds"] += seconds
            sums["waited"] += waited
            bar.advance(num_targets)
            bar.note(
                epoch=f"{state.epoch + 1}/{training.epochs}",
                loss=f"{values['train/loss']:.4f}",
                data_wait=f"{sums['waited'] / sums['seconds']:.1%}",
            )
            if worker.leads:
                alarms.check(step, values)
                if log is not None:
                    log.log(step, state.epoch, values)
    epoch_values = {
        "train/epoch_loss": sums["loss"] / sums["targets"],
        "train/epoch_targets_per_s": sums["targets"] / sums["seconds"],
        "train/padding": plan.padding,
    }
    if worker.leads and log is not None:
        log.log(step, state.epoch, epoch_values)
    return replace(state, epoch=state.epoch + 1, step=step), epoch_values


def _sum_over_workers(shares: list[MicrobatchLoss], worker: Worker) -> dict[str, float]:
    """Losses of the whole step (float64, one small all-reduce) and this worker's mean diagnostics."""
    names = ["train/loss", *(f"aux/{name}" for name in shares[0].aux)]
    totals = torch.zeros(len(names), dtype=torch.float64)
    for share in shares:
        parts = [share.cross_entropy, *share.aux.values()]
        totals += torch.stack([p.to(dtype=torch.float64, device="cpu") for p in parts])
    if worker.world > 1:
        totals = totals.to(worker.device)
        dist.all_reduce(totals)
    values = dict(zip(names, totals.tolist(), strict=True))
    for name in shares[0].diagnostics:
        values[f"diagnostics/{name}"] = sum(s.diagnostics[name] for s in shares) / len(shares)
    return values


def _refuse_nan(values: dict[str, float], step: int, epoch: int) -> None:
    bad = [name for name, value in values.items() if not math.isfinite(value)]
    if bad:
        raise DivergedError(
            f"{', '.join(bad)} is not finite at step {step} (epoch {epoch + 1}): training has diverged. The "
            "weights of the last checkpoint are untouched; lower training.optim.lr or set "
            "training.optim.clip_tower, then start the run again under a new name."
        )


def _out_of_patience(config: RunConfig, state: TrainState) -> bool:
    return 0 < config.training.patience <= state.stale
