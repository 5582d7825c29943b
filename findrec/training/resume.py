"""Resumes a training from its newest checkpoint, or starts it, cold or warm."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from itertools import chain
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from findrec.config import RunConfig
from findrec.datasets.batches.examples import ExampleSource
from findrec.datasets.folder.data_folder import DataFolder
from findrec.errors import FindRecError
from findrec.tables.base import Table
from findrec.training.checkpoints.checkpoint import TrainState, latest_checkpoint, load_checkpoint
from findrec.training.checkpoints.manifest import folder_name, step_of
from findrec.training.checkpoints.store import CheckpointStore
from findrec.training.identity import check_identity, data_identity
from findrec.training.tower import OPTIMIZER_STATE, Tower, check_weights
from findrec.training.warm_start import WarmStart, apply_warm_start, find_warm_start
from findrec.training.worker import share_text


def plan_digest(config: RunConfig, folder: DataFolder, source: ExampleSource[Any]) -> str:
    """A digest of everything that determines the steps of all epochs; resuming requires the same digest."""
    training = config.training
    parts = [
        folder.manifest.events_sha256,
        training.seed,
        training.microbatches,
        training.num_tokens,
        training.epochs,
        *source.identity(),
    ]
    return hashlib.sha256(repr(parts).encode()).hexdigest()


def restore(
    config: RunConfig,
    folder: DataFolder,
    checkpoints: Path,
    tower: Tower,
    tables: Mapping[str, Table],
    digest: str,
    earlier: Path | None = None,
) -> TrainState:
    """Load the newest checkpoint, else the configured warm start, else that of an earlier stage.

    A collective call. Other tables than that of items are not loaded from an earlier stage.
    """
    tensors = chain((table.weight for table in tables.values()), tower.model.parameters())
    device = next((tensor.device for tensor in tensors), torch.device("cpu"))
    path = _newest(CheckpointStore.of(config, checkpoints), checkpoints, device)
    if path is None:
        start = find_warm_start(config, folder)
        if start is None and earlier is not None:
            start = WarmStart(earlier, folder.num_items)
        if start is not None:
            apply_warm_start(start, tower, tables)
        return TrainState(
            epoch=0,
            step=0,
            plan=digest,
            best=-1.0,
            best_step=-1,
            stale=0,
            catalogue=data_identity(config, folder),
            started_from="" if start is None else start.title,
        )
    saved = load_checkpoint(path, verify=False)
    if saved.state.plan != digest:
        raise FindRecError(
            f"{path} was saved with other data or another epoch plan (seed, microbatches, tokens, epochs, "
            "max_length or overlap differ), so it cannot be resumed. Give this run another name, or "
            "pass --fresh to delete it."
        )
    check_identity(folder, saved.state.catalogue, path)
    check_weights(tower.model, saved.tower, path)
    moments = {f"{n}.{key}" for n, _ in tower.model.named_parameters() for key in OPTIMIZER_STATE}
    if missing := sorted([*(tables.keys() - saved.tables), *(moments - saved.optimizer_state.keys())]):
        raise FindRecError(
            f"{path} has no {missing[0]!r}: it was saved by another model, or for inference only"
        )
    tower.load(saved.tower, saved.optimizer_state, saved.state.step)
    for name, table in tables.items():
        try:
            table.load_state(saved.tables[name], saved.state.step)
        except (ValueError, KeyError) as error:
            raise FindRecError(f"{path} does not fit this run: {error}") from None
    return saved.state


def _newest(store: CheckpointStore | None, checkpoints: Path, device: torch.device) -> Path | None:
    """The newest valid checkpoint, the same on all workers (a collective call).

    Only rank 0 verifies it, as that reads all files. With a store the disks of the workers may differ; then
    it is the newest checkpoint that all workers have or can download.
    """
    is_rank_zero = not dist.is_initialized() or dist.get_rank() == 0
    if store is None:
        newest = latest_checkpoint(checkpoints) if is_rank_zero else None
        chosen = share_text(str(newest or ""), device)[0]
        return Path(chosen) if chosen else None
    store.fetch_newest(checkpoints)
    newest = latest_checkpoint(checkpoints)
    steps = [int(step) for step in share_text(str(step_of(newest.name) if newest else -1), device)]
    if min(steps) < 0:
        return None
    name = folder_name(min(steps))
    store.fetch_missing(name, checkpoints)
    return checkpoints / name
