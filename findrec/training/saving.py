"""Writing a checkpoint from the workers of a training: each its rows of the table, rank 0 what all know."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch.distributed as dist

from findrec.tables.base import Table
from findrec.training.checkpoint import (
    FileEntries,
    TrainState,
    begin_checkpoint,
    checkpoint_path,
    save_checkpoint,
    save_rows,
)
from findrec.training.tower import Tower
from findrec.training.worker import Worker


def save_training(root: Path, state: TrainState, tower: Tower, table: Table, worker: Worker) -> None:
    """Commit a checkpoint below `root` (collective: every worker calls it, and sees the same file system).

    Where one worker cannot write its rows, all raise `OSError` with its message.
    """

    def begin() -> FileEntries:
        if worker.leads:
            begin_checkpoint(root, state)
        return {}

    moments = tower.moments()  # a collective
    files: FileEntries | None = None
    if table.sharded:
        path = checkpoint_path(root, state)
        _together(worker, begin)
        parts = _together(worker, lambda: save_rows(path, table.first_row, table.state()))
        files = {name: entry for part in parts for name, entry in part.items()}
    if worker.leads:
        whole = None if table.sharded else table.state()
        weights = tower.model.state_dict()
        save_checkpoint(root, state, tower=weights, moments=moments, table=whole, table_files=files)


def _together(worker: Worker, act: Callable[[], FileEntries]) -> list[FileEntries]:
    """What `act` returns on each worker, once all are done."""
    own: tuple[str, FileEntries]
    try:
        own = ("", act())
    except Exception as error:  # safetensors has a type of its own for a full disk
        own = (f"worker {worker.rank}: {type(error).__name__}: {error}", {})
    found: list[Any] = [own]
    if worker.world > 1:
        found = [None] * worker.world
        dist.all_gather_object(found, own)
    problems = [problem for problem, _ in found if problem]
    if problems:
        raise OSError("; ".join(problems))
    return [entries for _, entries in found]
