"""Saves a checkpoint from all workers: each writes its rows of the item table, rank 0 the rest."""

from __future__ import annotations

import json
import shutil
import uuid
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path

import torch.distributed as dist
from torch import Tensor

from findrec.tables.base import Table
from findrec.training.checkpoints.checkpoint import (
    TABLE_FILE_BYTES,
    TrainState,
    begin_checkpoint,
    checkpoint_path,
    save_checkpoint,
    save_rows,
)
from findrec.training.checkpoints.manifest import FileEntries
from findrec.training.tower import Tower
from findrec.training.worker import Worker, share_text

_PROBE = ".probe"


def save_training(
    root: Path, state: TrainState, tower: Tower, tables: Mapping[str, Table], worker: Worker
) -> None:
    """Commit a checkpoint below `root` on rank 0's disk (a collective call).

    If all workers share that disk they write their rows of sharded tables themselves; otherwise rank 0
    receives and writes them. Raises `OSError` when the checkpoint cannot be written, after deleting the
    incomplete folder: on all workers if the rows of a sharded table failed, otherwise on rank 0 only.
    """
    weights, optimizer_state = tower.weights(), tower.optimizer_state()  # collectives
    sharded = {name: table for name, table in tables.items() if table.sharded}
    files = _save_parts(root, state, sharded, worker) if sharded else None
    if worker.is_rank_zero:
        complete = {name: table.state() for name, table in tables.items() if not table.sharded}
        save_checkpoint(
            root, state, tower=weights, optimizer_state=optimizer_state, tables=complete, table_files=files
        )


def snapshot_training(
    root: Path, state: TrainState, tower: Tower, tables: Mapping[str, Table], worker: Worker
) -> Callable[[], Path] | None:
    """Copy the content of a checkpoint to host memory on rank 0 (a collective call; not for sharded tables).

    Returns a function that writes the copy, while training may continue; None on the other workers.
    """

    def copied(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        if not worker.is_rank_zero:
            return {}
        return {name: value.detach().to("cpu", copy=True) for name, value in tensors.items()}

    weights, optimizer_state = copied(tower.weights()), copied(tower.optimizer_state())  # collectives
    if not worker.is_rank_zero:
        return None
    rows = {name: copied(table.state()) for name, table in tables.items()}
    return lambda: save_checkpoint(root, state, tower=weights, optimizer_state=optimizer_state, tables=rows)


def _save_parts(root: Path, state: TrainState, tables: Mapping[str, Table], worker: Worker) -> FileEntries:
    """Save the rows of sharded tables, each worker to its own files; the entries of all files."""
    path = checkpoint_path(root, state.step)

    token = uuid.uuid4().hex

    def begin() -> FileEntries:
        if worker.is_rank_zero:
            (begin_checkpoint(root, state) / _PROBE).write_text(token)
        return {}

    try:
        _on_all_workers(worker, begin)
        token_of_rank_zero = share_text(token, worker.device)[0]
        probe = path / _PROBE
        sees_probe = probe.is_file() and probe.read_text() == token_of_rank_zero
        shared_disk = set(share_text(str(sees_probe), worker.device)) == {str(True)}
        if worker.is_rank_zero:
            probe.unlink()
        entries: FileEntries = {}
        for name, table in tables.items():
            if shared_disk:
                save = partial(save_rows, path, table.first_row, table.state(), name)
                entries |= _on_all_workers(worker, save)
            else:
                entries |= _send_to_rank_zero(path, name, table, worker)
        return entries
    except OSError:
        if worker.is_rank_zero:
            shutil.rmtree(path, ignore_errors=True)
        raise


def _send_to_rank_zero(path: Path, name: str, table: Table, worker: Worker) -> FileEntries:
    """Rank 0 receives the rows of all workers, one file's worth at a time, and writes them."""
    state = table.state()
    row_ranges = share_text(json.dumps([table.first_row, len(table.weight)]), worker.device)
    step = max(1, TABLE_FILE_BYTES // (4 * len(state) * table.weight.shape[1]))
    entries: FileEntries = {}
    problem: OSError | None = None
    for rank, (first, count) in enumerate(map(json.loads, row_ranges)):
        if worker.rank not in (0, rank):
            continue
        for low in range(0, count, step):
            part = {key: rows[low : min(low + step, count)].contiguous() for key, rows in state.items()}
            if worker.rank != rank:
                size = (min(low + step, count) - low, table.weight.shape[1])
                part = {key: rows.new_empty(size) for key, rows in state.items()}
            for rows in part.values() if rank else ():
                dist.recv(rows, rank) if worker.is_rank_zero else dist.send(rows, 0)
            try:
                if worker.is_rank_zero and problem is None:
                    entries |= save_rows(path, first + low, part, name)
            except OSError as error:  # the other workers still send, so rank 0 goes on receiving
                problem = error

    def raise_or_return() -> FileEntries:
        if problem is not None:
            raise problem
        return entries

    return _on_all_workers(worker, raise_or_return)


def _on_all_workers(worker: Worker, act: Callable[[], FileEntries]) -> FileEntries:
    """Run `act` on every worker and merge the results (a collective call).

    Raises `OSError` on all workers if it failed on any.
    """
    try:
        own: FileEntries | str = act()
    except OSError as error:
        own = f"worker {worker.rank}: {error}"
    results = [json.loads(text) for text in share_text(json.dumps(own), worker.device)]
    if problems := [result for result in results if isinstance(result, str)]:
        raise OSError("; ".join(problems))
    return {name: entry for entries in results for name, entry in entries.items()}
