"""Saves and loads indexes of a run: `RUN/index/<factory>/index.faiss` with its metadata in `index.json`.

The FAISS file is read by FAISS's binary parser, never unpickled, and only if its sha256 is that of
`index.json`. An index of another checkpoint, width or catalogue is refused. As `index.json` is stored
next to the index, it only detects damage; searches check that the vectors are those of the checkpoint.
"""

from __future__ import annotations

import hashlib
import json
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any
from urllib.parse import quote, unquote

import numpy as np
from torch import Tensor

from findrec.errors import FindRecError
from findrec.evaluation.index.index import ItemIndex, held_items
from findrec.evaluation.index.search_batch import Ints, as_array
from findrec.evaluation.search.faiss_library import Gpus, keeps_vectors, need_faiss, reason
from findrec.files import read_json, replacing, sha256_file

FORMAT = 1
_CHECKED = 64  # items searched for, and results of each, when an index is loaded


@dataclass(frozen=True)
class IndexMetadata:
    """What an index was built from, and how to search it."""

    factory: str
    setting: str  # search setting, e.g. nprobe=8; empty: as built
    metric: str
    dim: int
    items: int  # number of items in the catalogue
    held: int  # number of items in the index: those that are ever available
    held_sha256: str  # of their ids, int64 ascending
    checkpoint: str  # name of its folder
    checkpoint_sha256: str  # of its manifest.json
    build_s: float
    faiss: str
    bytes: int  # of index.faiss
    sha256: str
    format: int = FORMAT


def index_folder(run_folder: Path, factory: str) -> Path:
    """The folder of a run's index with this factory string."""
    return run_folder / "index" / quote(factory, safe=",()").replace(".", "%2E")


def saved_indexes(run_folder: Path) -> list[str]:
    """The factory strings of a run's saved indexes."""
    return [unquote(path.parent.name) for path in sorted((run_folder / "index").glob("*/index.json"))]


def save_index(index: ItemIndex, run_folder: Path, checkpoint: Path, build_s: float = 0.0) -> Path:
    """Save an index of the item vectors of a checkpoint (a folder); returns the folder of the index."""
    faiss = need_faiss()
    folder = index_folder(run_folder, index.factory)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with replacing(folder / "index.faiss") as part:
            faiss.write_index(index.raw, str(part))
            num_items, dim = len(index.items_Vd) - 1, index.items_Vd.shape[1]
            metadata = IndexMetadata(
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
                bytes=part.stat().st_size,
                sha256=sha256_file(part),
            )
            # A crash between the next two steps leaves no index rather than a wrong one.
            (folder / "index.json").unlink(missing_ok=True)
        _write(folder, metadata)
    except (OSError, RuntimeError) as error:
        raise FindRecError(
            f"cannot write the index to {folder}: {str(error).splitlines()[-1]}. Check free disk space and "
            "permissions"
        ) from None
    return folder


def keep_setting(folder: Path, setting: str) -> None:
    """Save the search setting of a saved index."""
    _write(folder, replace(read_metadata(folder), setting=setting))


def read_metadata(folder: Path) -> IndexMetadata:
    """The metadata of a saved index; raises `FindRecError` if it is missing or cannot be read."""
    path = folder / "index.json"
    try:
        tree = read_json(path)
        if tree["format"] != FORMAT:
            raise _unusable(folder, f"{path} has format {tree['format']}, this version reads {FORMAT}")
        return IndexMetadata(**tree)
    except FileNotFoundError:
        saved = ", ".join(saved_indexes(folder.parent.parent)) or "none"
        raise _unusable(folder, f"no index in {folder} (available: {saved})") from None
    except (OSError, ValueError, KeyError, TypeError) as error:
        if isinstance(error, FindRecError):
            raise
        raise _unusable(folder, f"{path} cannot be read ({error})") from None


def load_index(
    run_folder: Path,
    factory: str,
    items_Vd: Tensor,
    checkpoint: Path,
    since_V: Tensor | None = None,
    *,
    gpus: Gpus = "none",
) -> ItemIndex:
    """Load the saved index of `factory` for the item vectors of a checkpoint.

    Raises `FindRecError` if there is none, if it was built from another checkpoint, width or catalogue, or if
    its file has changed.
    """
    folder = index_folder(run_folder, factory)
    metadata = read_metadata(folder)
    ids_I = held_items(len(items_Vd) - 1, since_V)
    checks = (
        ("the checkpoint", metadata.checkpoint, checkpoint.name),
        ("the checkpoint's manifest", metadata.checkpoint_sha256, sha256_file(checkpoint / "manifest.json")),
        ("the width of the vectors", metadata.dim, items_Vd.shape[1]),
        ("the number of items", metadata.items, len(items_Vd) - 1),
        ("the number of available items", metadata.held, len(ids_I)),
        ("the set of available items", metadata.held_sha256, hashlib.sha256(ids_I.tobytes()).hexdigest()),
    )
    for what, then, now in checks:
        if then != now:
            changed = f"{what} was {_short(then)} when it was built and is {_short(now)} now"
            raise _unusable(folder, f"the index in {folder} does not belong to this model: {changed}")
    raw = _read(folder, metadata)
    if (raw.d, raw.ntotal) != (metadata.dim, metadata.held):
        expected = f"index.json has {metadata.held:,} of {metadata.dim}"
        held = f"{raw.ntotal:,} vectors of width {raw.d}"
        raise _unusable(folder, f"{folder / 'index.faiss'} has {held}, {expected}")
    if not _belongs(raw, items_Vd, ids_I):
        raise _unusable(folder, f"{folder / 'index.faiss'} holds other vectors than {checkpoint}")
    index = ItemIndex(raw, items_Vd, since_V, factory, gpus)
    index.set(metadata.setting)
    return index


def _belongs(raw: Any, items_Vd: Tensor, ids_I: Ints) -> bool:
    """Whether searches for some of the items give these items' rows and inner products.

    Only the rows are checked for compressed vectors, whose results are scored again with `items_Vd`.
    """
    if raw.metric_type != need_faiss().METRIC_INNER_PRODUCT:
        return False
    vectors_Id = np.ascontiguousarray(as_array(items_Vd)[ids_I], dtype=np.float32)
    users_Bd = vectors_Id[:: max(1, len(vectors_Id) // _CHECKED)]
    scores_BK, row_BK = raw.search(users_Bd, min(_CHECKED, len(vectors_Id)))
    if row_BK.min() < -1 or row_BK.max() >= len(vectors_Id):
        return False
    if not keeps_vectors(raw):
        return True
    exact_BK = np.einsum("bd,bkd->bk", users_Bd, vectors_Id[row_BK])
    return bool(np.allclose(scores_BK[row_BK >= 0], exact_BK[row_BK >= 0], rtol=1e-3, atol=1e-3))


def _read(folder: Path, metadata: IndexMetadata) -> Any:
    path = folder / "index.faiss"
    if not path.is_file():
        raise _unusable(folder, f"{path} is missing")
    if path.stat().st_size != metadata.bytes or sha256_file(path) != metadata.sha256:
        raise _unusable(
            folder, f"{path} has changed since it was saved (its sha256 is not that of index.json)"
        )
    try:
        return need_faiss().read_index(str(path))
    except RuntimeError as error:
        problem = f"FAISS cannot read {path}, written by version {metadata.faiss}: {reason(error)}"
        raise _unusable(folder, problem) from None


def _write(folder: Path, metadata: IndexMetadata) -> None:
    with replacing(folder / "index.json") as part:
        part.write_text(json.dumps(asdict(metadata), indent=1) + "\n", encoding="utf-8")


def _unusable(folder: Path, problem: str) -> FindRecError:
    command = f"findrec index {folder.parent.parent.name} --factory '{unquote(folder.name)}'"
    return FindRecError(f"{problem}. Build it with: {command}")


def _short(value: object) -> str:
    return f"{value[:12]}..." if isinstance(value, str) and len(value) == 64 else str(value)
