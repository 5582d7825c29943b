"""The training loop: load, then for each planned step run this worker's microbatches, update, log; after each
epoch validate and save.

All state that resuming needs is the number of steps done; batches, dropout, noise and negatives follow from
it (the epoch plan and `microbatch_seed`), so the same run comes out whatever the number of workers.
"""

from __future__ import annotations

import hashlib
import math
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Protocol

import torch
import torch.distributed as dist
from torch import Tensor

from findrec.config import RunConfig
from findrec.datasets.batch import Batch, ModalRows
from findrec.datasets.batches import TrainLoader
from findrec.datasets.folder import DataFolder
from findrec.datasets.plan import Windows, cut_windows, plan_epoch
from findrec.errors import FindRecError
from findrec.evaluation.evaluate import Ranks, rank_split, summarise
from findrec.evaluation.scorers import ModelScorer
from findrec.progress import progress, say
from findrec.tables.item_table import ItemTable
from findrec.training.checkpoint import (
    TrainState,
    latest_checkpoint,
    load_checkpoint,
    prune_checkpoints,
    save_checkpoint,
)
from findrec.training.objectives import MicrobatchLoss, all_positions_loss, microbatch_seed
from findrec.training.schedule import learning_rate
from findrec.training.tower import Tower


class StepLog(Protocol):
    """Takes the metrics of a step (rank 0 only)."""

    def log(self, step: int, epoch: int, values: Mapping[str, float]) -> None:
        """Record `values` at `step`."""


@dataclass(frozen=True)
class Worker:
    """Who this process is among the workers."""

    rank: int = 0
    world: int = 1
    device: torch.device = field(default_factory=lambda: torch.device("cpu"))

    @property
    def leads(self) -> bool:
        """Rank 0 prints, logs and saves."""
        return self.rank == 0


def run_training(
    config: RunConfig,
    folder: DataFolder,
    checkpoints: Path,
    tower: Tower,
    table: ItemTable,
    *,
    modalities: list[str],
    worker: Worker,
    log: StepLog | None = None,
    on_resume: Callable[[int], None] | None = None,
    after_epoch: Callable[[dict[str, float]], None] | None = None,
) -> TrainState:
    """Train to the end, from the newest checkpoint in `checkpoints` or from the start.

    `on_resume(step)` is called on rank 0 before anything is logged; `after_epoch(metrics)` on every rank.
    """
    training = config.training
    windows = cut_windows(folder, config.data.max_length, config.data.overlap)
    plan_digest = _plan_digest(config, folder, windows)
    state = _restore(checkpoints, tower, table, plan_digest)
    if worker.leads and on_resume is not None:
        on_resume(state.step)
    while state.epoch < training.epochs and not _out_of_patience(config, state):
        state, values = _run_epoch(config, folder, windows, tower, table, state, modalities, worker, log)
        last = state.epoch == training.epochs
        if state.epoch % training.eval_every == 0 or last:
            metrics = _validate(config, folder, tower, table, modalities, worker)
            values |= {f"valid/{name}": metrics[name] for name in ("ndcg@10", "recall@10", "mrr")}
            better = metrics["ndcg@10"] > state.best
            state = replace(
                state,
                best=metrics["ndcg@10"] if better else state.best,
                best_step=state.step if better else state.best_step,
                stale=0 if better else state.stale + 1,
            )
            if worker.leads and log is not None:
                log.log(state.step, state.epoch, {k: v for k, v in values.items() if k.startswith("valid/")})
        done = last or _out_of_patience(config, state)
        if state.epoch % training.save_every == 0 or state.best_step == state.step or done:
            moments = tower.moments()  # a collective: every rank takes part
            if worker.leads:
                weights = tower.model.state_dict()
                save_checkpoint(checkpoints, state, tower=weights, moments=moments, table=table.state())
                prune_checkpoints(checkpoints, keep=training.keep, best_step=state.best_step)
        if after_epoch is not None:
            after_epoch(values)
    return state


def _run_epoch(
    config: RunConfig,
    folder: DataFolder,
    windows: Windows,
    tower: Tower,
    table: ItemTable,
    state: TrainState,
    modalities: list[str],
    worker: Worker,
    log: StepLog | None,
) -> tuple[TrainState, dict[str, float]]:
    training = config.training
    plan = plan_epoch(
        windows,
        seed=training.seed,
        epoch=state.epoch,
        microbatches=training.microbatches,
        tokens=training.tokens,
    )
    num_steps = training.epochs * len(plan.steps)  # epochs differ by a few steps at most; only the rate uses it
    loader = TrainLoader(folder, windows, plan, rank=worker.rank, world=worker.world)
    tower.model.train()
    what = f"{config.model.name} epoch {state.epoch + 1}/{training.epochs}"
    sums = dict.fromkeys(("loss", "targets", "seconds", "waited"), 0.0)
    mark = time.perf_counter()
    step = state.step
    with progress(what, total=int(plan.targets.sum()), unit="targets", enabled=worker.leads) as bar:
        for index, microbatches in loader:
            waited = time.perf_counter() - mark
            num_targets = int(plan.targets[index])
            shares = []
            for microbatch, batch in microbatches:
                batch = batch.to(worker.device)
                features = batch_features(folder, batch, modalities)
                share = all_positions_loss(
                    tower,
                    table,
                    batch,
                    features,
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
            bar.note(loss=f"{values['train/loss']:.4f}", data_wait=f"{sums['waited'] / sums['seconds']:.1%}")
            if worker.leads and log is not None:
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
        raise FindRecError(
            f"{', '.join(bad)} is not finite at step {step} (epoch {epoch + 1}): training has diverged. The "
            "weights of the last checkpoint are untouched; lower training.optim.lr or set "
            "training.optim.clip_tower, then start the run again under a new name."
        )


def _validate(
    config: RunConfig,
    folder: DataFolder,
    tower: Tower,
    table: ItemTable,
    modalities: list[str],
    worker: Worker,
) -> dict[str, float]:
    """Exact full-catalogue metrics on the validation targets; the same on every rank."""
    tower.model.eval()
    scorer = ModelScorer(
        tower.model,
        table.weight,
        folder,
        modalities=modalities,
        max_length=config.data.max_length,
        device=worker.device,
    )
    ranks = rank_split(
        scorer,
        folder,
        "valid",
        users_per_block=config.evaluation.users_per_block,
        max_length=config.data.max_length,
        mask_seen=config.evaluation.mask_seen is True,
        rank=worker.rank,
        world=worker.world,
    )
    ranks = _gather_ranks(ranks, worker)
    row = summarise(ranks, folder, "valid", ks=[10], model=config.model.name, mask_seen=False)
    if worker.leads:
        say(f"  validation: ndcg@10 {row['ndcg@10']:.4f}  recall@10 {row['recall@10']:.4f}")
    return row


def _gather_ranks(ranks: Ranks, worker: Worker) -> Ranks:
    if worker.world == 1:
        return ranks
    own = torch.from_numpy(ranks.to_array()).to(worker.device)
    sizes: list[Tensor] = [own.new_zeros(1) for _ in range(worker.world)]
    dist.all_gather(sizes, own.new_tensor([own.shape[0]]))
    longest = max(int(s) for s in sizes)
    padded = own.new_zeros(longest, own.shape[1])
    padded[: own.shape[0]] = own
    parts = [torch.empty_like(padded) for _ in range(worker.world)]
    dist.all_gather(parts, padded)
    kept = [part[: int(size)].cpu().numpy() for part, size in zip(parts, sizes, strict=True)]
    return Ranks.concat([Ranks.from_array(part) for part in kept])


def _out_of_patience(config: RunConfig, state: TrainState) -> bool:
    return 0 < config.training.patience <= state.stale


def _plan_digest(config: RunConfig, folder: DataFolder, windows: Windows) -> str:
    """What the steps of all epochs follow from; a checkpoint of another plan cannot be resumed."""
    training = config.training
    parts = [
        folder.manifest.events_hash,
        training.seed,
        training.microbatches,
        training.tokens,
        training.epochs,
        config.data.max_length,
        config.data.overlap,
        len(windows.user),
    ]
    return hashlib.sha256(repr(parts).encode()).hexdigest()


def _restore(checkpoints: Path, tower: Tower, table: ItemTable, plan_digest: str) -> TrainState:
    path = latest_checkpoint(checkpoints)
    if path is None:
        return TrainState(epoch=0, step=0, plan=plan_digest, best=-1.0, best_step=-1, stale=0)
    saved = load_checkpoint(path)
    if saved.state.plan != plan_digest:
        raise FindRecError(
            f"{path} was made with other data or another epoch plan (seed, microbatches, tokens, epochs, "
            "max_length or overlap differ), so it cannot be continued. Give this run another name, or "
            "start it anew with --fresh."
        )
    tower.load(saved.tower, saved.moments, saved.state.step)
    table.load_state(saved.table, saved.state.step)
    return saved.state


def batch_features(folder: DataFolder, batch: Batch, modalities: list[str]) -> dict[str, ModalRows]:
    """Features of the batch's distinct items, on the batch's device."""
    rows = {m: folder.feature(m).rows(batch.ids.cpu()) for m in modalities}
    device = batch.ids.device
    return {m: ModalRows(r.values.to(device), r.present.to(device)) for m, r in rows.items()}
