"""`findrec features`: add a modality to an existing data folder."""

from __future__ import annotations

import re
import shutil
import time
from pathlib import Path

import numpy as np

from findrec.datasets.encoders.make_features import (
    ExistingFeatures,
    add_feature,
    encoding_folder,
    make_feature,
)
from findrec.datasets.folder.data_folder import DataFolder
from findrec.datasets.folder.writer import writing
from findrec.datasets.sources.recipe import MODALITY, FeatureSpec, ImageFeature, ReadyFeature, TextFeature
from findrec.errors import FindRecError
from findrec.progress import format_seconds


def feature_from_options(
    *,
    text: bool = False,
    images: str | None = None,
    vectors: str | None = None,
    modality: str | None = None,
    encoder: str | None = None,
    column: str | None = None,
    ids: str | None = None,
    id_column: str | None = None,
    vector_column: str | None = None,
) -> tuple[str, FeatureSpec]:
    """Modality name and feature spec from command line options; `FindRecError` if they are inconsistent.

    Paths are relative to the working directory.
    """
    if sum([text, images is not None, vectors is not None]) != 1:
        raise FindRecError("choose what to encode: exactly one of --text, --images PATH and --vectors FILE")
    if column is not None and images is None:
        raise FindRecError("--column is an option of --images")
    if vectors is None and (ids, id_column, vector_column) != (None, None, None):
        raise FindRecError("--ids, --id-column and --vector-column are options of --vectors")
    name = modality or ("text" if text else "image" if images is not None else None)
    if name is None:
        raise FindRecError("name the modality of the vectors, for example: --modality image")
    if not re.match(MODALITY, name):
        raise FindRecError(
            f"--modality {name!r}: use lower-case letters, digits and _, starting with a letter"
        )
    spec: FeatureSpec
    if vectors is not None:
        spec = ReadyFeature(
            path=_absolute(vectors),
            ids=_absolute(ids) if ids is not None else None,
            id_column=id_column,
            vector_column=vector_column,
        )
    elif images is not None:
        spec = ImageFeature(path=_absolute(images), column=column)
    else:
        spec = TextFeature()
    return name, spec if encoder is None else spec.model_copy(update={"encoder": encoder})


def _absolute(path: str) -> str:
    return str(Path(path).expanduser().absolute())


def add_features(
    path: Path, modality: str, spec: FeatureSpec, *, missing: bool = False, force: bool = False
) -> str:
    """Encode a modality and add it to the data folder at `path`.

    An existing modality is kept unless `force` replaces it, or `missing` adds the items that lack it. After
    an error the folder is unchanged, and vectors already encoded are reused by the next call. Waits for
    another process that writes the folder. Returns a summary.
    """
    if not path.is_dir():
        DataFolder.open(path)  # raises, without leaving a lock
    with writing(path):
        return _add_features(path, modality, spec, missing=missing, force=force)


def _add_features(path: Path, modality: str, spec: FeatureSpec, *, missing: bool, force: bool) -> str:
    start = time.monotonic()
    folder = DataFolder.open(path)
    entry = next((e for e in folder.manifest.features if e.modality == modality), None)
    existing = None
    if entry is not None and missing:
        existing = ExistingFeatures(entry, folder.feature(modality))
    elif entry is not None and not force:
        raise FindRecError(
            f"{path} already has vectors {modality!r} (by {entry.encoder}, {entry.missing:,} items without). "
            "--missing adds these items, --force encodes all again, --modality sets another name"
        )
    scratch = encoding_folder(path)
    made = make_feature(modality, spec, folder.items, path, scratch=scratch, existing=existing)
    folder = add_feature(path, made)
    shutil.rmtree(scratch, ignore_errors=True)
    table = folder.feature(modality)
    present = int(np.count_nonzero(table.present))
    return (
        f"ready: {path}: {modality} [{len(table):,}, {table.dim}] by {made.feature.encoder}; {present:,} of "
        f"{folder.num_items:,} items have it ({format_seconds(time.monotonic() - start)})"
    )
