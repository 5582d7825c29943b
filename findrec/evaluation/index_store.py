"""Indexes kept with their run: `RUN/index/<factory>/index.faiss` and `index.json`, which says what it is of.

FAISS's file is read by its own binary parser, never unpickled, and only when it has the sha256 that
`index.json` gives. An index of another checkpoint, width or catalogue is refused.
"""

from __future__ import annotations

import hashlib
import json
import os
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any
from urllib.parse import quote, unquote

from torch import Tensor

from findrec.datasets.manifest import sha256_file
from findrec.errors import FindRecError
from findrec.evaluation.faiss_library import Gpus, need_faiss
from findrec.evaluation.index import ItemIndex, held_items

FORMAT = 1


@dataclass(frozen=True)
class IndexMark:
    """What an index was built of, and how to search it."""

    factory: str
    setting: str  # searched with, e.g. nprobe=8; empty: as built
    metric: str
    dim: int
    items: int  # of the catalogue
    held: int  # in the index: those ever on offer
    held_sha256: str  # of their ids, int64 ascending
    checkpoint: str  # its folder's name
    checkpoint_sha256: str  # of its manifest.json
    build_s: float
    faiss: str
    bytes: int  # of index.faiss
    sha256: str
    format: int = FORMAT


def index_folder(run_folder: Path, factory: str) -> Path:
    """Where a run keeps its index of a factory string."""
    return run_folder / "index" / quote(factory, safe=",()").replace(".", "%2E")


def saved_indexes(run_folder: Path) -> list[str]:
    """The factory strings of a run's saved indexes."""
    return [unquote(path.parent.name) for path in sorted((run_folder / "index").glob("*/index.json"))]


def save_index(index: ItemIndex, run_folder: Path, checkpoint: Path, build_s: float = 0.0) -> Path:
    """Write an index of the vectors of a checkpoint (its folder); returns the folder of the index."""
    faiss = need_faiss()
    folder = index_folder(run_folder, index.factory)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        temporary = folder / f".index.faiss.{os.getpid()}"
        faiss.write_index(index.raw, str(temporary))
        num_items, dim = len(index.items_Vd) - 1, index.items_Vd.shape[1]
        mark = IndexMark(
            factory=index.factory,
            setting=index.setting,
            metric="inner product",
            dim=dim,
            items=num_items,
            held=len(index.ids_I),
            held_sha256=hashlib.sha256(index.ids_I.tobytes()).hexdigest(),
            checkpoint=checkpoint.name,
            checkpoint_sha256=sha256_file(checkpoint / "manifest.json"),
            build_s=build_s,
            faiss=faiss.__version__,
            bytes=temporary.stat().st_size,
            sha256=sha256_file(temporary),
        )
        (folder / "index.json").unlink(missing_ok=True)  # a crash in between leaves no index, not a wrong one
        temporary.replace(folder / "index.faiss")
        _write(folder, mark)
    except (OSError, RuntimeError) as error:
        raise FindRecError(
            f"cannot write the index to {folder}: {str(error).splitlines()[-1]}. Is the disk full, or "
            "the run folder not yours?"
        ) from None
    return folder


def keep_setting(folder: Path, setting: str) -> None:
    """Note how a saved index is to be searched."""
    _write(folder, replace(read_mark(folder), setting=setting))


def read_mark(folder: Path) -> IndexMark:
    """What a saved index is; raises `FindRecError` where there is none or it cannot be read."""
    path = folder / "index.json"
    mend = f"Build it with: {_command(folder, unquote(folder.name))}"
    try:
        tree = json.loads(path.read_text(encoding="utf-8"))
        if tree["format"] != FORMAT:
            raise FindRecError(f"{path} has format {tree['format']}, this version reads {FORMAT}. {mend}")
        return IndexMark(**tree)
    except FileNotFoundError:
        there = ", ".join(saved_indexes(folder.parent.parent)) or "none"
        raise FindRecError(f"no index in {folder} (there: {there}). {mend}") from None
    except (OSError, ValueError, KeyError, TypeError) as error:
        if isinstance(error, FindRecError):
            raise
        raise FindRecError(f"{path} cannot be read ({error}). {mend}") from None


def load_index(
    run_folder: Path,
    factory: str,
    items_Vd: Tensor,
    checkpoint: Path,
    since_V: Tensor | None = None,
    *,
    gpus: Gpus = "none",
) -> ItemIndex:
    """The saved index of `factory`, checked against the vectors and the checkpoint it is to be used with.

    Raises `FindRecError` where there is none, where it is of another checkpoint, width or catalogue, and
    where its file is not what was saved.
    """
    folder = index_folder(run_folder, factory)
    mark = read_mark(folder)
    ids_I = held_items(len(items_Vd) - 1, since_V)
    checks = (
        ("the checkpoint", mark.checkpoint, checkpoint.name),
        ("the checkpoint's manifest", mark.checkpoint_sha256, sha256_file(checkpoint / "manifest.json")),
        ("the width of the vectors", mark.dim, items_Vd.shape[1]),
        ("the number of items", mark.items, len(items_Vd) - 1),
        ("the number of items on offer", mark.held, len(ids_I)),
        ("the items on offer", mark.held_sha256, hashlib.sha256(ids_I.tobytes()).hexdigest()),
    )
    for what, then, now in checks:
        if then != now:
            raise FindRecError(
                f"the index in {folder} does not belong to this model: {what} was {_short(then)} when it was "
                f"built and is {_short(now)} now. Build it anew: {_command(folder, factory)}"
            )
    raw = _read(folder, mark)
    if (raw.d, raw.ntotal) != (mark.dim, mark.held):
        raise FindRecError(
            f"{folder / 'index.faiss'} holds {raw.ntotal:,} vectors of width {raw.d}, index.json says "
            f"{mark.held:,} of {mark.dim}. Build it anew: {_command(folder, factory)}"
        )
    index = ItemIndex(raw, items_Vd, since_V, factory, gpus)
    index.set(mark.setting)
    return index


def _read(folder: Path, mark: IndexMark) -> Any:
    path = folder / "index.faiss"
    if not path.is_file():
        raise FindRecError(f"{path} is missing. Build it anew: {_command(folder, mark.factory)}")
    if path.stat().st_size != mark.bytes or sha256_file(path) != mark.sha256:
        raise FindRecError(
            f"{path} differs from what was saved (its sha256 is not that of index.json) and is not read. "
            f"Build it anew: {_command(folder, mark.factory)}"
        )
    try:
        return need_faiss().read_index(str(path))
    except RuntimeError as error:
        raise FindRecError(
            f"FAISS cannot read {path}, written by version {mark.faiss}: {str(error).splitlines()[-1]}. "
            f"Build it anew: {_command(folder, mark.factory)}"
        ) from None


def _write(folder: Path, mark: IndexMark) -> None:
    temporary = folder / f".index.json.{os.getpid()}"
    temporary.write_text(json.dumps(asdict(mark), indent=1) + "\n", encoding="utf-8")
    temporary.replace(folder / "index.json")


def _command(folder: Path, factory: str) -> str:
    return f"findrec index {folder.parent.parent.name} --factory '{factory}'"


def _short(value: object) -> str:
    return f"{value[:12]}..." if isinstance(value, str) and len(value) == 64 else str(value)
