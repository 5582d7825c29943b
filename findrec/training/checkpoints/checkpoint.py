"""Writes, verifies and reads checkpoints: folders of safetensors and JSON files, without pickles.

A checkpoint is a folder `step-<8 digits>` with `tower.safetensors` (weights by parameter name),
`tower_moments.safetensors` (optimizer state, `<parameter>.<name>`), `table-<first>-<last>.safetensors` (rows
of the item table and their optimizer state; each worker writes the rows it holds to its own files),
`state.json` (epoch, step, metric, plan) and `manifest.json` (size and sha256 of the other files). The
manifest is written last and commits the checkpoint. A folder whose manifest is missing or does not verify is
skipped with a warning, so a crash while saving loses no earlier checkpoint.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any

from pydantic import TypeAdapter, ValidationError
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from findrec.errors import FindRecError
from findrec.files import read_json, replacing, sha256_file
from findrec.progress import warn
from findrec.tables.base import ITEMS
from findrec.training.checkpoints.manifest import (
    FORMAT,
    MANIFEST,
    MOMENTS,
    STATE,
    TOWER,
    FileEntries,
    check_files,
    folder_name,
    newer_version,
    read_entries,
    step_of,
)
from findrec.training.checkpoints.saved_table import SavedTable, file_stem, saved_tables

TABLE_FILE_BYTES = 512 << 20  # per file, as its tensors are copied before they are written
CatalogueFingerprint = dict[str, Any]  # see `findrec.training.identity`


@dataclass(frozen=True)
class TrainState:
    """Progress of a training; together with the epoch plan it is all that resuming needs."""

    epoch: int  # completed epochs
    step: int  # completed optimizer steps
    plan: str  # digest of the windows and plan settings the steps were planned from
    best: float  # best validation NDCG@10 so far, -1 before the first
    best_step: int
    stale: int  # validations since the best one
    epoch_step: int = 0  # completed steps of the current epoch
    epoch_loss: float = 0.0  # summed token losses of these steps
    epoch_targets: int = 0
    seconds: float = 0.0  # in all completed steps, if training.max_seconds is set: it differs in every run
    catalogue: CatalogueFingerprint = field(default_factory=dict)  # identity of the data
    started_from: str = ""  # the checkpoint of another run used as warm start


_STATE = TypeAdapter(TrainState)
_STATE_KEYS = {item.name for item in fields(TrainState)}
_CATALOGUE_KEYS = {"items", "event_types", "encoders"}


@dataclass(frozen=True)
class Checkpoint:
    """A loaded checkpoint."""

    path: Path
    state: TrainState
    tower: dict[str, Tensor]
    optimizer_state: dict[str, Tensor]
    tables: dict[str, SavedTable]

    @property
    def table(self) -> SavedTable:
        """The item table."""
        return self.tables[ITEMS]


def _write_json(path: Path, value: object) -> None:
    with replacing(path, sync=True) as part:
        part.write_text(json.dumps(value, indent=1, sort_keys=True))


def begin_checkpoint(root: Path, state: TrainState) -> Path:
    """Create an empty folder for a checkpoint below `root` (called by one process)."""
    path = checkpoint_path(root, state.step)
    if path.exists():
        shutil.rmtree(path)  # of a run that crashed while saving, or of the same step saved before
    path.mkdir(parents=True)
    return path


def checkpoint_path(root: Path, step: int) -> Path:
    """The folder below `root` of the checkpoint of a step."""
    return root / folder_name(step)


def save_rows(path: Path, first: int, table: Mapping[str, Tensor], name: str = ITEMS) -> FileEntries:
    """Write this worker's rows of the table `name`, starting at row `first`; returns their manifest entries.

    Raises `OSError` when a file cannot be written.
    """
    num_rows, width = next(iter(table.values())).shape
    step = max(1, TABLE_FILE_BYTES // (4 * len(table) * width))
    files = []
    for low in range(0, num_rows, step):
        part = {key: value[low : low + step] for key, value in table.items()}
        last = first + min(low + step, num_rows) - 1
        files.append(path / f"{file_stem(name)}-{first + low}-{last}.safetensors")
        _save(part, files[-1])
    return _entries(files)


def save_checkpoint(
    root: Path,
    state: TrainState,
    *,
    tower: Mapping[str, Tensor],
    optimizer_state: Mapping[str, Tensor],
    tables: Mapping[str, Mapping[str, Tensor]],
    table_files: FileEntries | None = None,
) -> Path:
    """Write and commit one checkpoint below `root` (called by one process); returns its folder.

    `tables` are the complete tables by name. For sharded ones pass `table_files`: the entries that
    `save_rows` returned on all workers, for files in the folder made by `begin_checkpoint`. Raises `OSError`
    when the checkpoint cannot be written, after deleting the incomplete folder.
    """
    path = checkpoint_path(root, state.step)
    try:
        entries = dict(table_files or {})
        if table_files is None:
            begin_checkpoint(root, state)
        for name, table in tables.items():
            entries |= save_rows(path, 0, table, name)
        _save(tower, path / TOWER)
        _save(optimizer_state, path / MOMENTS)
        _write_json(path / STATE, asdict(state))
        entries |= _entries(p for p in sorted(path.iterdir()) if p.is_file() and p.name not in entries)
        _write_json(path / MANIFEST, {"format": FORMAT, "files": entries})
    except OSError:
        shutil.rmtree(path, ignore_errors=True)  # free the space for the next checkpoint
        raise
    _write_json(root / "latest.json", {"step": state.step})  # only a hint: the manifests decide
    return path


def _save(tensors: Mapping[str, Tensor], file: Path) -> None:
    try:
        save_file({name: value.detach().cpu().contiguous() for name, value in tensors.items()}, file)
    except SafetensorError as error:  # e.g. a full disk
        raise OSError(str(error)) from error


def _entries(files: Iterable[Path]) -> FileEntries:
    return {p.name: {"bytes": p.stat().st_size, "sha256": sha256_file(p)} for p in files}


def verify_checkpoint(path: Path) -> str | None:
    """The reason why a checkpoint folder is not valid, or None if it is valid."""
    try:
        entries = read_entries(path)
        if (problem := check_files(path, entries)) is not None:
            return problem
        state = _parse_state(path)
    except ValueError as error:
        if isinstance(error, FindRecError):
            raise
        return str(error)
    if step_of(path.name) not in (None, state.step):
        return f"it is a copy of the checkpoint of step {state.step}"
    return None


def refuse_newer_checkpoint(path: Path, shown: str | None = None, *, certain: bool = True) -> None:
    """Raise `FindRecError` if a newer version of FindRec wrote a checkpoint, called `shown` in the message.

    To train over it would lose what this version cannot read. See `manifest.newer_version` for `certain`.
    """
    if reason := newer_version(path, _STATE_KEYS, certain=certain):
        raise FindRecError(
            f"checkpoint {shown or path} was written by a newer version of FindRec ({reason}). Update it "
            "to use the checkpoint, or start a run with another name. Nothing was changed"
        )


def refuse_newer(root: Path, *, certain: bool = True) -> None:
    """`refuse_newer_checkpoint` for all checkpoints below `root`."""
    for path in list_checkpoints(root):
        refuse_newer_checkpoint(path, certain=certain)


def checkpoint_folder(training: Path) -> Path:
    """Where the checkpoints of a training lie, below its folder."""
    return training / "checkpoints"


def list_checkpoints(root: Path) -> list[Path]:
    """All checkpoint folders below `root`, oldest first, committed or not, without copies."""
    found = [(step, p) for p in root.glob("step-*") if (step := step_of(p.name)) is not None and p.is_dir()]
    return [path for _, path in sorted(found)]


def latest_checkpoint(root: Path) -> Path | None:
    """The newest checkpoint that verifies; damaged ones are skipped with a warning.

    Raises `FindRecError` if there are checkpoints of a newer version.
    """
    refuse_newer(root)
    for path in reversed(list_checkpoints(root)):
        problem = verify_checkpoint(path)
        if problem is None:
            return path
        warn(f"WARNING: checkpoint {path} is not used: {problem}")
    refuse_newer(root, certain=False)
    return None


def read_state(path: Path) -> TrainState:
    """The training state of a checkpoint; raises `FindRecError` if it cannot be read."""
    try:
        return _parse_state(path)
    except ValueError as error:
        raise FindRecError(f"checkpoint {path} cannot be read: {error}") from None


def _parse_state(path: Path) -> TrainState:
    try:
        tree = read_json(path / STATE)
        if isinstance(tree, dict) and (unknown := sorted(tree.keys() - _STATE_KEYS)):
            raise ValueError(f"unknown key {unknown[0]!r}")
        state = _STATE.validate_json(json.dumps(tree), strict=True)
        if state.catalogue and not (
            state.catalogue.keys() >= _CATALOGUE_KEYS
            and isinstance(items := state.catalogue["items"], list)
            and [type(part) for part in items] == [str, str]
            and items[0].isdecimal()
            and isinstance(state.catalogue["encoders"], dict)
        ):
            raise ValueError("`catalogue` does not identify the items")
    except ValidationError as error:
        first = error.errors()[0]
        key = ".".join(map(str, first["loc"]))
        raise ValueError(f"its {STATE} is not valid ({key}: {first['msg']})") from None
    except (OSError, ValueError) as error:
        raise ValueError(f"its {STATE} cannot be read ({error})") from None
    return state


def load_checkpoint(path: Path, *, verify: bool = True) -> Checkpoint:
    """Load a checkpoint; raises `FindRecError` if it cannot be read or, with `verify`, does not verify."""
    try:
        entries = read_entries(path)
        problem = verify_checkpoint(path) if verify else None
        if problem is not None:
            raise ValueError(problem)
        return Checkpoint(
            path=path,
            state=_parse_state(path),
            tower=load_file(path / TOWER),
            optimizer_state=load_file(path / MOMENTS),
            tables=saved_tables(path, entries),
        )
    except (ValueError, OSError, SafetensorError) as error:
        if isinstance(error, FindRecError):
            raise
        raise FindRecError(f"cannot load checkpoint {path}: {error}") from None
