"""The feature tables that a recipe or a user asks for, and putting one into a data folder that is there."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from findrec.datasets.encode import encode_text
from findrec.datasets.encode_rows import Encoded
from findrec.datasets.features import FeatureInput, FeatureTable, spread, store_feature
from findrec.datasets.folder import DataFolder
from findrec.datasets.manifest import (
    FeatureEntry,
    SourceEntry,
    read_manifest,
    sha256_file,
    write_manifest,
)
from findrec.datasets.ready_vectors import read_ids, read_vectors
from findrec.datasets.recipe import FeatureSpec, ImageFeature, ReadyFeature, TextFeature
from findrec.datasets.vector_store import VectorStore
from findrec.datasets.writer import cannot_write
from findrec.errors import FindRecError, suggest
from findrec.paths import resolve


@dataclass(frozen=True)
class Made:
    """A modality ready to be written, and the files that it was made from."""

    feature: FeatureInput
    entries: list[SourceEntry]


@dataclass(frozen=True)
class Before:
    """What a data folder holds of a modality: present rows are kept, and only missing ones encoded."""

    entry: FeatureEntry
    table: FeatureTable
    kept: NDArray[np.bool_] | None = None  # rows of the table that may be kept; None: all


def scratch_of(folder: Path) -> Path:
    """Where the vectors of a data folder are kept while they are made: a hidden sibling, used again after a
    crash.
    """
    return folder.parent / f".{folder.name}.encoding"


def place_of(path: str, root: Path) -> Path:
    """A path of a recipe: relative to the recipe's folder `root`, or else to FindRec's home."""
    beside = root / Path(path).expanduser()
    return beside if beside.exists() else resolve(path)


def is_there(spec: FeatureSpec, root: Path) -> bool:
    """Whether a feature's files are there; a text needs none."""
    return isinstance(spec, TextFeature) or place_of(spec.path, root).exists()


def is_wanted(spec: FeatureSpec, root: Path) -> bool:
    """Whether a feature is to be made: optional ones only with their files."""
    return isinstance(spec, TextFeature) or not spec.optional or is_there(spec, root)


def _listing(folder: Path) -> SourceEntry:
    """A folder of images as a source: by names and sizes, as hashing the images would read them all."""
    from findrec.datasets.images import Pictures

    files = sorted((picture.name, picture.length) for picture in Pictures(folder).all())
    told = "\n".join(f"{size} {name}" for name, size in files).encode("utf-8", "surrogateescape")
    total = sum(size for _, size in files)
    return SourceEntry(source="", place="", sha256=hashlib.sha256(told).hexdigest(), bytes=total)


def feature_sources(modality: str, spec: FeatureSpec, root: Path) -> list[SourceEntry]:
    """The files that a feature is made from, as the manifest names them."""
    if isinstance(spec, TextFeature):
        return []
    found = []
    for given in [spec.path, *([spec.ids] if isinstance(spec, ReadyFeature) and spec.ids else [])]:
        path = place_of(given, root)
        if not path.exists():
            raise FindRecError(f"features.{modality}: there is no {path}")
        entry = (
            _listing(path)
            if path.is_dir()
            else SourceEntry(source="", place="", sha256=sha256_file(path), bytes=path.stat().st_size)
        )
        names = {"source": f"features.{modality}", "place": path.name}
        found.append(entry.model_copy(update=names))
    return found


def _column(items: pa.Table, name: str) -> list[str | None]:
    if name not in items.column_names:
        known = [c for c in items.column_names if items.schema.field(c).type == pa.string()]
        raise FindRecError(
            f"the items have no column {name!r}{suggest(name, known)} (there: {', '.join(known)})"
        )
    values: list[str | None] = items[name].to_pylist()
    return values


def _inputs(spec: TextFeature | ImageFeature, items: pa.Table, root: Path) -> list[Any]:
    """What is to be encoded of each item, None where there is nothing."""
    if isinstance(spec, TextFeature):
        return [text if text and text.strip() else None for text in _column(items, "text")]
    from findrec.datasets.images import find_pictures

    paths = _column(items, spec.column) if spec.column is not None else None
    return list(find_pictures(place_of(spec.path, root), items["raw"].to_pylist(), paths))


def _encode(
    spec: TextFeature | ImageFeature, inputs: list[Any], store: VectorStore, before: Before | None
) -> Encoded:
    if before is not None and all(given is None for given in inputs):  # nothing to add: no encoder is needed
        entry = before.entry
        values, none = np.zeros((len(inputs), entry.dim), np.float16), np.zeros(len(inputs), dtype=bool)
        return Encoded(values, none, entry.encoder, entry.revision, entry.weights_sha256, [])
    if isinstance(spec, TextFeature):
        return encode_text(inputs, spec.encoder, store=store)
    from findrec.datasets.encode_images import encode_images

    return encode_images(inputs, spec.encoder, store=store, need_one=before is None)


def _ready(spec: ReadyFeature, items: pa.Table, root: Path) -> Encoded:
    path = place_of(spec.path, root)
    ids = read_ids(place_of(spec.ids, root), spec.id_column) if spec.ids is not None else None
    raw = items["raw"].to_pylist()
    found = read_vectors(path, raw, ids=ids, id_column=spec.id_column, vector_column=spec.vector_column)
    return Encoded(found.values, found.present, spec.encoder or f"ready: {path.name}", "", "", [])


def make_feature(
    modality: str,
    spec: FeatureSpec,
    items: pa.Table,
    root: Path,
    *,
    scratch: Path | None = None,
    before: Before | None = None,
) -> Made:
    """One modality of `items` (V rows: raw, title, text, ...). Relative paths of `spec` start at `root`.

    With a folder `scratch` vectors are kept there while they are made. With `before`, items that have a
    vector keep it, and new ids may follow the old ones. Raises `FindRecError` where nothing can be encoded,
    or where `before` was made by another encoder.
    """
    sources = feature_sources(modality, spec, root)
    ids = np.arange(1, items.num_rows + 1)
    if before is not None:
        has = np.zeros(items.num_rows + 1, dtype=bool)
        has[: len(before.table)] = before.table.present
        if before.kept is not None:
            has[: len(before.table)] &= before.kept
        ids = ids[~has[1:]]
        if not isinstance(spec, ReadyFeature) and before.entry.encoder != spec.encoder:
            raise _other_encoder(before, spec.encoder)
    if isinstance(spec, ReadyFeature):
        encoded = _ready(spec, items, root)
        encoded = replace(encoded, values=encoded.values[ids - 1], present=encoded.present[ids - 1])
    else:
        inputs = _inputs(spec, items, root)
        encoded = _encode(spec, [inputs[i - 1] for i in ids], VectorStore(scratch), before)
    if before is not None and encoded.weights_sha256 != before.entry.weights_sha256:
        raise _other_encoder(before, f"{encoded.encoder} of other weights")
    values, present = spread(
        items.num_rows,
        ids,
        encoded.values,
        encoded.present,
        base=before.table if before is not None else None,
        scratch=scratch if scratch is not None and scratch.is_dir() else None,
    )
    feature = FeatureInput(
        modality, values, present, encoded.encoder, encoded.weights_sha256, encoded.revision
    )
    return Made(feature, sources)


def _other_encoder(before: Before, now: str) -> FindRecError:
    return FindRecError(
        f"the vectors of {before.entry.modality!r} were made by {before.entry.encoder}, not by {now}: rows "
        "of two encoders must not share a table. Make all anew with --force (and without --grow)"
    )


def add_feature(path: Path, made: Made) -> DataFolder:
    """Put a modality into a data folder, in place of the one of its name; returns the folder, opened.

    The table is whole before the manifest that names it takes the old one's place, so a crash leaves the
    folder as it was. `FindRecError` where it cannot be written.
    """
    manifest = read_manifest(path)
    feature = made.feature
    old = next((entry.file for entry in manifest.features if entry.modality == feature.modality), None)
    file = f"features/{feature.modality}.safetensors"
    if file in manifest.files:  # never write into what the manifest names
        file = f"features/{feature.modality}-2.safetensors"
    part = path / "features" / f".{feature.modality}.part"  # one that a crash left is written over
    try:
        entry = store_feature(path, feature, str(part.relative_to(path))).model_copy(update={"file": file})
        digest = sha256_file(part)
        part.replace(path / file)
        files = {name: told for name, told in manifest.files.items() if name != old}
        source = f"features.{feature.modality}"
        update = {
            "features": [*(e for e in manifest.features if e.modality != feature.modality), entry],
            "sources": [*(e for e in manifest.sources if e.source != source), *made.entries],
            "files": {**files, file: digest},
        }
        write_manifest(path, manifest.model_copy(update=update))
        if old is not None and old != file:
            (path / old).unlink(missing_ok=True)
    except OSError as error:
        raise cannot_write(path, error) from error
    finally:
        part.unlink(missing_ok=True)
    return DataFolder.open(path, verify=False)  # what is new was hashed as it was written
