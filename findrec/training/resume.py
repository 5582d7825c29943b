"""Continuing a training: from the newest checkpoint that was made by the same plan."""

from __future__ import annotations

import hashlib
from pathlib import Path

import torch
import torch.distributed as dist

from findrec.config import RunConfig
from findrec.datasets.folder import DataFolder
from findrec.datasets.plan import Windows
from findrec.errors import FindRecError
from findrec.tables.base import Table
from findrec.training.checkpoint import TrainState, latest_checkpoint, load_checkpoint
from findrec.training.checkpoint_store import CheckpointStore
from findrec.training.tower import Tower
from findrec.training.warm_start import apply_warm_start, find_warm_start, mark_catalogue
from findrec.training.worker import share_text


def plan_digest(config: RunConfig, folder: DataFolder, windows: Windows) -> str:
    """What the steps of all epochs follow from; a checkpoint of another plan cannot be resumed."""
    training = config.training
    parts = [
        folder.manifest.events_sha256,
        training.seed,
        training.microbatches,
        training.tokens,
        training.epochs,
        config.data.max_length,
        config.data.overlap,
        config.data.shuffle_ties,
        training.objective,
        len(windows.user),
    ]
    return hashlib.sha256(repr(parts).encode()).hexdigest()


def restore(
    config: RunConfig, folder: DataFolder, checkpoints: Path, tower: Tower, table: Table, digest: str
) -> TrainState:
    """Where training goes on: at the newest checkpoint, else at the start, warm or cold (collective)."""
    path = _newest(CheckpointStore.of(config, checkpoints), checkpoints, table.weight.device)
    if path is None:
        start = find_warm_start(config, folder)
        if start is not None:
            apply_warm_start(start, tower, table)
        return TrainState(
            *(0, 0),
            plan=digest,
            best=-1.0,
            best_step=-1,
            stale=0,
            catalogue=mark_catalogue(config, folder),
            started_from="" if start is None else start.title,
        )
    saved = load_checkpoint(path, verify=False)
    if saved.state.plan != digest:
        raise FindRecError(
            f"{path} was made with other data or another epoch plan (seed, microbatches, tokens, epochs, "
            "max_length or overlap differ), so it cannot be continued. Give this run another name, or "
            "start it anew with --fresh."
        )
    tower.load(saved.tower, saved.moments, saved.state.step)
    table.load_state(saved.table, saved.state.step)
    return saved.state


def _newest(store: CheckpointStore | None, checkpoints: Path, device: torch.device) -> Path | None:
    """The newest checkpoint that verifies. One of the workers reads it through for all, so that a sharded
    table is not read once by each of them, and they agree.

    With a store the disks of the workers may differ: then it is the newest that everybody has or can fetch.
    """
    leads = not dist.is_initialized() or dist.get_rank() == 0
    if store is None:
        found = latest_checkpoint(checkpoints) if leads else None
        chosen = share_text(str(found or ""), device)[0]
        return Path(chosen) if chosen else None
    store.fetch_newest(checkpoints)
    found = latest_checkpoint(checkpoints)
    name = min(share_text(found.name if found else "", device))
    if not name:
        return None
    store.fetch_missing(name, checkpoints)
    return checkpoints / name
