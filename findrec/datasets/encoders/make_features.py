"""Make the feature table of a modality and add it to an existing data folder."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from findrec.datasets.encoders.encoder import Encoded
from findrec.datasets.encoders.ready_vectors import read_ids, read_vectors
from findrec.datasets.encoders.text_encoder import encode_text
from findrec.datasets.encoders.vector_store import VectorStore
from findrec.datasets.folder.data_folder import DataFolder
from findrec.datasets.folder.features import FeatureInput, FeatureTable, scatter_features, store_feature
from findrec.datasets.folder.manifest import (
    FeatureEntry,
    SourceEntry,
    read_manifest,
    write_manifest,
)
from findrec.datasets.folder.writer import cannot_write, writing
from findrec.datasets.sources.recipe import FeatureSpec, ImageFeature, ReadyFeature, TextFeature
from findrec.errors import FindRecError, suggest
from findrec.files import replacing, sha256_file
from findrec.paths import resolve


@dataclass(frozen=True)
class ModalityFeatures:
    """Features of a modality and the source files from which they were made."""

    feature: FeatureInput
    entries: list[SourceEntry]


@dataclass(frozen=True)
class ExistingFeatures:
    """Existing features of a modality: present rows are reused, and only missing ones are encoded."""

    entry: FeatureEntry
    table: FeatureTable
    reusable: NDArray[np.bool_] | None = None  # [V+1] rows that may be reused; None: all


def encoding_folder(folder: Path) -> Path:
    """Folder for the vectors of a data folder during encoding: a hidden sibling, which survives a crash."""
    return folder.parent / f".{folder.name}.encoding"


def resolve_path(path: str, root: Path) -> Path:
    """Resolve a path of a recipe: relative to the recipe's folder `root`, or else to FindRec's home."""
    local = root / Path(path).expanduser()
    return local if local.exists() else resolve(path)


def has_files(spec: FeatureSpec, root: Path) -> bool:
    """Whether a feature's source files exist; text features need none."""
    return isinstance(spec, TextFeature) or resolve_path(spec.path, root).exists()


def should_make(spec: FeatureSpec, root: Path) -> bool:
    """Whether to make a feature: optional ones only if their files exist."""
    return isinstance(spec, TextFeature) or not spec.optional or has_files(spec, root)


def _folder_hash(folder: Path) -> tuple[str, int]:
    """The sha256 of the names and sizes of a folder's images, and their total bytes."""
    from findrec.datasets.encoders.image_files import ImageFiles

    files = sorted((file.name, file.length) for file in ImageFiles(folder).all())
    listing = "\n".join(f"{size} {name}" for name, size in files).encode("utf-8", "surrogateescape")
    return hashlib.sha256(listing).hexdigest(), sum(size for _, size in files)


def feature_sources(modality: str, spec: FeatureSpec, root: Path) -> list[SourceEntry]:
    """Manifest entries of the files from which a feature is made."""
    if isinstance(spec, TextFeature):
        return []
    entries = []
    for name in [spec.path, *([spec.ids] if isinstance(spec, ReadyFeature) and spec.ids else [])]:
        path = resolve_path(name, root)
        if not path.exists():
            raise FindRecError(f"features.{modality}: {path} does not exist")
        sha256, size = _folder_hash(path) if path.is_dir() else (sha256_file(path), path.stat().st_size)
        source = f"features.{modality}"
        entries.append(SourceEntry(source=source, place=path.name, sha256=sha256, bytes=size))
    return entries


def _column(items: pa.Table, name: str) -> list[str | None]:
    if name not in items.column_names:
        known = [c for c in items.column_names if items.schema.field(c).type == pa.string()]
        raise FindRecError(
            f"the items have no column {name!r}{suggest(name, known)} (columns: {', '.join(known)})"
        )
    values: list[str | None] = items[name].to_pylist()
    return values


def _inputs(spec: TextFeature | ImageFeature, items: pa.Table, root: Path) -> list[Any]:
    """The encoder's input for each item; None if an item has none."""
    if isinstance(spec, TextFeature):
        return [text if text and text.strip() else None for text in _column(items, "text")]
    from findrec.datasets.encoders.image_files import find_images

    paths = _column(items, spec.column) if spec.column is not None else None
    return list(find_images(resolve_path(spec.path, root), items["raw"].to_pylist(), paths))


def _encode(
    spec: TextFeature | ImageFeature, inputs: list[Any], store: VectorStore, existing: ExistingFeatures | None
) -> Encoded:
    if existing is not None and all(value is None for value in inputs):  # do not load the encoder
        entry = existing.entry
        values, present = np.zeros((len(inputs), entry.dim), np.float16), np.zeros(len(inputs), dtype=bool)
        return Encoded(values, present, entry.encoder, entry.revision, entry.weights_sha256, [])
    if isinstance(spec, TextFeature):
        return encode_text(inputs, spec.encoder, store=store)
    from findrec.datasets.encoders.image_encoder import encode_images

    return encode_images(inputs, spec.encoder, store=store, need_one=existing is None)


def _ready(spec: ReadyFeature, items: pa.Table, root: Path, existing: ExistingFeatures | None) -> Encoded:
    path = resolve_path(spec.path, root)
    ids = read_ids(resolve_path(spec.ids, root), spec.id_column) if spec.ids is not None else None
    raw = items["raw"].to_pylist()
    vectors = read_vectors(path, raw, ids=ids, id_column=spec.id_column, vector_column=spec.vector_column)
    # Vectors that complete a table keep its name: runs that were trained with it would refuse another.
    encoder = spec.encoder or (f"ready: {path.name}" if existing is None else existing.entry.encoder)
    return Encoded(vectors.values, vectors.present, encoder, "", "", [])


def make_feature(
    modality: str,
    spec: FeatureSpec,
    items: pa.Table,
    root: Path,
    *,
    scratch: Path | None = None,
    existing: ExistingFeatures | None = None,
) -> ModalityFeatures:
    """Make the features of one modality for `items` (V rows: raw, title, text, ...).

    Paths of `spec` are relative to `root`. Vectors are kept in `scratch` during encoding, so that an
    interrupted run can resume. Rows of `existing` features, which must be of the same encoder, are reused.
    """
    sources = feature_sources(modality, spec, root)
    ids = np.arange(1, items.num_rows + 1)
    if existing is not None:
        reused = np.zeros(items.num_rows + 1, dtype=bool)
        reused[: len(existing.table)] = existing.table.present
        if existing.reusable is not None:
            reused[: len(existing.table)] &= existing.reusable
        ids = ids[~reused[1:]]
        if not isinstance(spec, ReadyFeature) and existing.entry.encoder != spec.encoder:
            raise _other_encoder(existing, spec.encoder)
    if isinstance(spec, ReadyFeature):
        encoded = _ready(spec, items, root, existing)
        encoded = replace(encoded, values=encoded.values[ids - 1], present=encoded.present[ids - 1])
    else:
        inputs = _inputs(spec, items, root)
        encoded = _encode(spec, [inputs[i - 1] for i in ids], VectorStore(scratch), existing)
    if existing is not None and encoded.weights_sha256 != existing.entry.weights_sha256:
        raise _other_encoder(existing, f"{encoded.encoder} with other weights")
    values, present = scatter_features(
        items.num_rows,
        ids,
        encoded.values,
        encoded.present,
        base=existing.table if existing is not None else None,
        scratch=scratch if scratch is not None and scratch.is_dir() else None,
    )
    feature = FeatureInput(
        modality, values, present, encoded.encoder, encoded.weights_sha256, encoded.revision
    )
    return ModalityFeatures(feature, sources)


def _other_encoder(existing: ExistingFeatures, encoder: str) -> FindRecError:
    return FindRecError(
        f"the vectors of {existing.entry.modality!r} were made by {existing.entry.encoder}, not by "
        f"{encoder}: two encoders must not share a table. Encode all again with --force (and without --grow)"
    )


def add_feature(path: Path, made: ModalityFeatures) -> DataFolder:
    """Add a modality to a data folder, replacing one of the same name, and open the folder.

    The table is complete before the new manifest replaces the old one, so a crash leaves the folder
    unchanged. Modalities that another process has added meanwhile are kept.
    """
    with writing(path):
        return _add_feature(path, made)


def _add_feature(path: Path, made: ModalityFeatures) -> DataFolder:
    manifest = read_manifest(path)
    feature = made.feature
    old = next((entry.file for entry in manifest.features if entry.modality == feature.modality), None)
    file = f"features/{feature.modality}.safetensors"
    if file in manifest.files:  # never overwrite a file that the manifest names
        file = f"features/{feature.modality}-2.safetensors"
    try:
        with replacing(path / file) as part:
            entry = store_feature(path, feature, str(part.relative_to(path)))
            entry, digest = entry.model_copy(update={"file": file}), sha256_file(part)
        files = {name: sha256 for name, sha256 in manifest.files.items() if name != old}
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
    return DataFolder.open(path, verify=False)  # the new file was hashed when written
