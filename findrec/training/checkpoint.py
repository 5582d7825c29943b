"""Checkpoints: safetensors and JSON, never a pickle; committed by the manifest, which is written last.

A checkpoint is a folder `step-<8 digits>` with `tower.safetensors` (weights by parameter name),
`tower_moments.safetensors` (`<parameter>.<moment>`), `table-<first>-<last>.safetensors` (rows of the item
table and their moments, files for each worker that holds some of its own), `state.json` (epoch, step,
metric, plan, versions) and `manifest.json` (bytes and sha256 of the others). A folder whose manifest is
missing or does not verify was never committed and is passed over with a warning; a crash while saving
therefore loses nothing.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from findrec.errors import FindRecError
from findrec.progress import say
from findrec.training.saved_table import SavedTable

FORMAT = 1
MANIFEST = "manifest.json"
TABLE_FILE_BYTES = 512 << 20  # a file's tensors are copied before they are written
FileEntries = dict[str, dict[str, Any]]  # bytes and sha256 by file name, as in the manifest
CatalogueMark = dict[str, Any]  # see `findrec.training.warm_start.mark_catalogue`


@dataclass(frozen=True)
class TrainState:
    """Where training stands; with the epoch plan this is all that resuming needs."""

    epoch: int  # epochs done
    step: int  # optimizer steps done
    plan: str  # digest of the windows and plan settings the steps were planned from
    best: float  # best validation NDCG@10 so far, -1 before the first
    best_step: int
    stale: int  # validations since the best
    epoch_step: int = 0  # steps done of the epoch under way
    epoch_loss: float = 0.0  # their summed token losses
    epoch_targets: int = 0
    catalogue: CatalogueMark = field(default_factory=dict)  # whose rows the table holds
    started_from: str = ""  # the checkpoint of another run that this training began with


@dataclass(frozen=True)
class Checkpoint:
    """A checkpoint read back."""

    path: Path
    state: TrainState
    tower: dict[str, Tensor]
    moments: dict[str, Tensor]
    table: SavedTable


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return (
            hashlib.file_digest(file, "sha256").hexdigest()
            if hasattr(hashlib, "file_digest")
            else (hashlib.sha256(file.read()).hexdigest())
        )


def _write_json(path: Path, value: object) -> None:
    temporary = path.with_suffix(".tmp")
    with temporary.open("w") as file:
        json.dump(value, file, indent=1, sort_keys=True)
        file.flush()
        os.fsync(file.fileno())
    temporary.replace(path)


def begin_checkpoint(root: Path, state: TrainState) -> Path:
    """An empty folder for a checkpoint below `root` (one process calls this)."""
    path = checkpoint_path(root, state)
    if path.exists():
        shutil.rmtree(path)  # left by a run that died while saving, or the same step saved again
    path.mkdir(parents=True)
    return path


def checkpoint_path(root: Path, state: TrainState) -> Path:
    """The folder of a checkpoint below `root`."""
    return root / f"step-{state.step:08d}"


def save_rows(path: Path, first: int, table: Mapping[str, Tensor]) -> FileEntries:
    """Write the rows `first`, ... of the item table that this worker holds; its part of the manifest.

    Raises `OSError` when they cannot be written.
    """
    num_rows, width = next(iter(table.values())).shape
    step = max(1, TABLE_FILE_BYTES // (4 * len(table) * width))
    files = []
    for low in range(0, num_rows, step):
        part = {name: value[low : low + step] for name, value in table.items()}
        files.append(path / f"table-{first + low}-{first + min(low + step, num_rows) - 1}.safetensors")
        _save(part, files[-1])
    return _entries(files)


def save_checkpoint(
    root: Path,
    state: TrainState,
    *,
    tower: Mapping[str, Tensor],
    moments: Mapping[str, Tensor],
    table: Mapping[str, Tensor] | None = None,
    table_files: FileEntries | None = None,
) -> Path:
    """Write and commit one checkpoint below `root` (one process calls this); returns its folder.

    `table` is the whole item table. Where workers hold parts of it, `table_files` are instead what
    `save_rows` returned to each, for the folder that `begin_checkpoint` made. Raises `OSError` when it cannot
    be written; nothing of it is left then.
    """
    path = checkpoint_path(root, state)
    try:
        entries = dict(table_files or {})
        if table is not None:
            entries = save_rows(begin_checkpoint(root, state), 0, table)
        _save(tower, path / "tower.safetensors")
        _save(moments, path / "tower_moments.safetensors")
        _write_json(path / "state.json", asdict(state))
        entries |= _entries(p for p in sorted(path.iterdir()) if p.is_file() and p.name not in entries)
        _write_json(path / MANIFEST, {"format": FORMAT, "files": entries})
    except OSError:
        shutil.rmtree(path, ignore_errors=True)  # its room is needed for the next one
        raise
    _write_json(root / "latest.json", {"step": state.step})  # a hint; the manifests decide
    return path


def _save(tensors: Mapping[str, Tensor], file: Path) -> None:
    try:
        save_file({name: value.detach().cpu().contiguous() for name, value in tensors.items()}, file)
    except SafetensorError as error:  # a full disk, for one
        raise OSError(str(error)) from error


def _entries(files: Iterable[Path]) -> FileEntries:
    return {p.name: {"bytes": p.stat().st_size, "sha256": _sha256(p)} for p in files}


def verify_checkpoint(path: Path) -> str | None:
    """Why a checkpoint folder cannot be trusted, or None when it can."""
    try:
        manifest = json.loads((path / MANIFEST).read_text())
        entries = manifest["files"]
    except FileNotFoundError:
        return "it has no manifest.json: saving it was cut short"
    except (json.JSONDecodeError, KeyError, TypeError) as error:
        return f"its manifest.json cannot be read ({error})"
    if manifest.get("format") != FORMAT:
        return f"its format is {manifest.get('format')}, this version reads {FORMAT}"
    for name, entry in entries.items():
        file = path / name
        if not file.is_file():
            return f"{name} is missing"
        if file.stat().st_size != entry["bytes"] or _sha256(file) != entry["sha256"]:
            return f"{name} differs from what was saved"
    return None


def list_checkpoints(root: Path) -> list[Path]:
    """All checkpoint folders below `root`, oldest first, committed or not."""
    return sorted(p for p in root.glob("step-*") if p.is_dir()) if root.is_dir() else []


def latest_checkpoint(root: Path) -> Path | None:
    """The newest checkpoint that verifies; damaged ones are named loudly and passed over."""
    for path in reversed(list_checkpoints(root)):
        problem = verify_checkpoint(path)
        if problem is None:
            return path
        say(f"WARNING: checkpoint {path} is not used: {problem}")
    return None


def read_state(path: Path) -> TrainState:
    """Where training stood at a checkpoint that verifies."""
    return TrainState(**json.loads((path / "state.json").read_text()))


def load_checkpoint(path: Path, *, verify: bool = True) -> Checkpoint:
    """Read a checkpoint; raises `FindRecError` when it does not verify (unless somebody just did that)."""
    problem = verify_checkpoint(path) if verify else None
    if problem is not None:
        raise FindRecError(f"cannot load checkpoint {path}: {problem}")
    return Checkpoint(
        path=path,
        state=read_state(path),
        tower=load_file(path / "tower.safetensors"),
        moments=load_file(path / "tower_moments.safetensors"),
        table=SavedTable(path),
    )
