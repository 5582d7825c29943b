"""Writing a checkpoint from the workers of a training: each its rows of the table, rank 0 what all know."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

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
from findrec.training.worker import Worker, share_text


def save_training(root: Path, state: TrainState, tower: Tower, table: Table, worker: Worker) -> None:
    """Commit a checkpoint below `root` (collective: every worker calls it, and sees the same file system).

    Raises `OSError` where it cannot be written: on all workers when the rows of one are what cannot, else on
    rank 0. Nothing of it is left then.
    """
    weights, moments = tower.weights(), tower.moments()  # collectives
    files = _save_parts(root, state, table, worker) if table.sharded else None
    if worker.leads:
        whole = None if table.sharded else table.state()
        save_checkpoint(root, state, tower=weights, moments=moments, table=whole, table_files=files)


def _save_parts(root: Path, state: TrainState, table: Table, worker: Worker) -> FileEntries:
    """Each worker's rows, in files of its own."""
    path = checkpoint_path(root, state)

    def begin() -> FileEntries:
        if worker.leads:
            begin_checkpoint(root, state)
        return {}

    try:
        _together(worker, begin)
        return _together(worker, lambda: save_rows(path, table.first_row, table.state()))
    except OSError:
        if worker.leads:
            shutil.rmtree(path, ignore_errors=True)
        raise


def _together(worker: Worker, act: Callable[[], FileEntries]) -> FileEntries:
    """What `act` returns on all workers, joined, once all are done."""
    try:
        own: FileEntries | str = act()
    except OSError as error:
        own = f"worker {worker.rank}: {error}"
    found = [json.loads(text) for text in share_text(json.dumps(own), worker.device)]
    if problems := [each for each in found if isinstance(each, str)]:
        raise OSError("; ".join(problems))
    return {name: entry for entries in found for name, entry in entries.items()}
