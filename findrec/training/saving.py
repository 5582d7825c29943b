"""Writing a checkpoint from the workers of a training: each its rows of the table, rank 0 what all know."""

from __future__ import annotations

import json
import shutil
import uuid
from collections.abc import Callable, Mapping
from pathlib import Path

import torch.distributed as dist
from torch import Tensor

from findrec.tables.base import Table
from findrec.training.checkpoint import (
    TABLE_FILE_BYTES,
    FileEntries,
    TrainState,
    begin_checkpoint,
    checkpoint_path,
    save_checkpoint,
    save_rows,
)
from findrec.training.tower import Tower
from findrec.training.worker import Worker, share_text

_PROBE = ".probe"


def save_training(root: Path, state: TrainState, tower: Tower, table: Table, worker: Worker) -> None:
    """Commit a checkpoint below `root` of rank 0's disk (collective: every worker calls it).

    Workers that see that disk write their rows themselves; else rank 0 receives and writes them all. Raises
    `OSError` where it cannot be written: on all workers when rows are what cannot, else on rank 0. Nothing of
    it is left then.
    """
    weights, moments = tower.weights(), tower.moments()  # collectives
    files = _save_parts(root, state, table, worker) if table.sharded else None
    if worker.leads:
        whole = None if table.sharded else table.state()
        save_checkpoint(root, state, tower=weights, moments=moments, table=whole, table_files=files)


def snapshot_training(root: Path, state: TrainState, tower: Tower, table: Table) -> Callable[[], Path]:
    """Copies of all that a checkpoint holds, in the machine's own memory (collective; not for a sharded
    table). What is returned writes them, on one worker, whatever training does meanwhile.
    """
    parts = [_copied(named) for named in (tower.weights(), tower.moments(), table.state())]
    weights, moments, rows = parts
    return lambda: save_checkpoint(root, state, tower=weights, moments=moments, table=rows)


def _copied(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {name: value.detach().to("cpu", copy=True) for name, value in tensors.items()}


def _save_parts(root: Path, state: TrainState, table: Table, worker: Worker) -> FileEntries:
    """Each worker's rows, in files of its own."""
    path = checkpoint_path(root, state)

    token = uuid.uuid4().hex

    def begin() -> FileEntries:
        if worker.leads:
            (begin_checkpoint(root, state) / _PROBE).write_text(token)
        return {}

    try:
        _together(worker, begin)
        wanted = share_text(token, worker.device)[0]
        probe = path / _PROBE
        seen = probe.is_file() and probe.read_text() == wanted
        one_disk = set(share_text(str(seen), worker.device)) == {str(True)}
        if worker.leads:
            probe.unlink()
        if one_disk:
            return _together(worker, lambda: save_rows(path, table.first_row, table.state()))
        return _send_to_leader(path, table, worker)
    except OSError:
        if worker.leads:
            shutil.rmtree(path, ignore_errors=True)
        raise


def _send_to_leader(path: Path, table: Table, worker: Worker) -> FileEntries:
    """All rows, written by rank 0, which is sent as many at a time as a file holds."""
    state = table.state()
    held = share_text(json.dumps([table.first_row, len(table.weight)]), worker.device)
    step = max(1, TABLE_FILE_BYTES // (4 * len(state) * table.weight.shape[1]))
    entries: FileEntries = {}
    problem: OSError | None = None
    for rank, (first, count) in enumerate(map(json.loads, held)):
        if worker.rank not in (0, rank):
            continue
        for low in range(0, count, step):
            part = {name: rows[low : min(low + step, count)].contiguous() for name, rows in state.items()}
            if worker.rank != rank:
                size = (min(low + step, count) - low, table.weight.shape[1])
                part = {name: rows.new_empty(size) for name, rows in state.items()}
            for rows in part.values() if rank else ():
                dist.recv(rows, rank) if worker.leads else dist.send(rows, 0)
            try:
                if worker.leads and problem is None:
                    entries |= save_rows(path, first + low, part)
            except OSError as error:  # the others send all the same
                problem = error

    def settle() -> FileEntries:
        if problem is not None:
            raise problem
        return entries

    return _together(worker, settle)


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
