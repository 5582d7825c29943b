"""Checkpoints: safetensors and JSON, never a pickle; committed by the manifest, which is written last.

A checkpoint is a folder `step-<8 digits>` with `tower.safetensors` (weights by parameter name),
`tower_moments.safetensors` (`<parameter>.<moment>`), `table-<first>-<last>.safetensors` (rows of the item
table and their moments), `state.json` (epoch, step, metric, plan, versions) and `manifest.json` (bytes and
sha256 of the others). A folder whose manifest is missing or does not verify was never committed and is
passed over with a warning; a crash while saving therefore loses nothing.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from findrec.errors import FindRecError
from findrec.progress import say

FORMAT = 1
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
    table: dict[str, Tensor]


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


def _cpu(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {name: value.detach().cpu().contiguous() for name, value in tensors.items()}


def save_checkpoint(
    root: Path,
    state: TrainState,
    *,
    tower: Mapping[str, Tensor],
    moments: Mapping[str, Tensor],
    table: Mapping[str, Tensor],
) -> Path:
    """Write and commit one checkpoint below `root` (one process calls this); returns its folder.

    Raises `OSError` when it cannot be written; nothing of it is left then.
    """
    path = root / f"step-{state.step:08d}"
    try:
        _write_checkpoint(path, state, tower=tower, moments=moments, table=table)
    except OSError:
        shutil.rmtree(path, ignore_errors=True)  # its room is needed for the next one
        raise
    _write_json(root / "latest.json", {"step": state.step})  # a hint; the manifests decide
    return path


def _write_checkpoint(
    path: Path,
    state: TrainState,
    *,
    tower: Mapping[str, Tensor],
    moments: Mapping[str, Tensor],
    table: Mapping[str, Tensor],
) -> None:
    if path.exists():
        shutil.rmtree(path)  # left by a run that died while saving, or the same step saved again
    path.mkdir(parents=True)
    last = next(iter(table.values())).shape[0] - 1
    parts = {"tower": tower, "tower_moments": moments, f"table-0-{last}": table}
    for name, tensors in parts.items():
        try:
            save_file(_cpu(tensors), path / f"{name}.safetensors")
        except SafetensorError as error:  # a full disk, for one
            raise OSError(str(error)) from error
    _write_json(path / "state.json", asdict(state))
    files = sorted(p for p in path.iterdir() if p.is_file())
    entries = {p.name: {"bytes": p.stat().st_size, "sha256": _sha256(p)} for p in files}
    _write_json(path / "manifest.json", {"format": FORMAT, "files": entries})


def verify_checkpoint(path: Path) -> str | None:
    """Why a checkpoint folder cannot be trusted, or None when it can."""
    try:
        manifest = json.loads((path / "manifest.json").read_text())
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


def best_checkpoint_path(root: Path) -> Path | None:
    """The checkpoint of the best validation; the newest one if the best is damaged or there is none."""
    newest = latest_checkpoint(root)
    if newest is None:
        return None
    best_step = read_state(newest).best_step
    best = root / f"step-{best_step:08d}"
    if best != newest and best_step >= 0:
        if (problem := verify_checkpoint(best)) is None:
            return best
        say(f"WARNING: the best checkpoint {best} is not used, the newest is: {problem}")
    return newest


def best_checkpoint(root: Path) -> Checkpoint | None:
    """`best_checkpoint_path`, loaded."""
    path = best_checkpoint_path(root)
    return None if path is None else load_checkpoint(path)


def read_state(path: Path) -> TrainState:
    """Where training stood at a checkpoint that verifies."""
    return TrainState(**json.loads((path / "state.json").read_text()))


def load_checkpoint(path: Path) -> Checkpoint:
    """Read a checkpoint; raises `FindRecError` when it does not verify."""
    problem = verify_checkpoint(path)
    if problem is not None:
        raise FindRecError(f"cannot load checkpoint {path}: {problem}")
    (table,) = path.glob("table-*.safetensors")
    return Checkpoint(
        path=path,
        state=read_state(path),
        tower=load_file(path / "tower.safetensors"),
        moments=load_file(path / "tower_moments.safetensors"),
        table=load_file(table),
    )


def prune_checkpoints(root: Path, *, keep: int, best_step: int) -> None:
    """Delete all but the newest `keep` checkpoints and the best one."""
    for path in list_checkpoints(root)[:-keep]:
        if path.name != f"step-{best_step:08d}":
            # The manifest goes first, so that a folder half deleted is not trusted.
            (path / "manifest.json").unlink(missing_ok=True)
            shutil.rmtree(path, ignore_errors=True)
