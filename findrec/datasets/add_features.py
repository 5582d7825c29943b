"""`findrec features`: what was asked for on the command line, put into a data folder that is there."""

from __future__ import annotations

import re
import shutil
import time
from pathlib import Path

import numpy as np

from findrec.datasets.folder import DataFolder
from findrec.datasets.make_features import Before, add_feature, make_feature, scratch_of
from findrec.datasets.recipe import MODALITY, FeatureSpec, ImageFeature, ReadyFeature, TextFeature
from findrec.errors import FindRecError
from findrec.progress import format_seconds


def asked_for(
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
    """The modality's name and how it is made; `FindRecError` where the options do not fit together.

    Relative paths start at the working directory, as everywhere on a command line.
    """
    if sum([text, images is not None, vectors is not None]) != 1:
        raise FindRecError("say what to encode: exactly one of --text, --images PLACE and --vectors FILE")
    if column is not None and images is None:
        raise FindRecError("--column belongs to --images")
    if vectors is None and (ids, id_column, vector_column) != (None, None, None):
        raise FindRecError("--ids, --id-column and --vector-column belong to --vectors")
    name = modality or ("text" if text else "image" if images is not None else None)
    if name is None:
        raise FindRecError("give the vectors a name: --modality image, say")
    if not re.match(MODALITY, name):
        raise FindRecError(f"--modality {name!r}: a name is of small letters, digits and _, a letter first")
    spec: FeatureSpec
    if vectors is not None:
        spec = ReadyFeature(
            path=_absolute(vectors),
            ids=_absolute(ids) if ids is not None else None,
            id_column=id_column,
            vector_column=vector_column,
            encoder=encoder or "",
        )
    elif images is not None:
        named = {"encoder": encoder} if encoder is not None else {}
        spec = ImageFeature(path=_absolute(images), column=column, **named)
    else:
        spec = TextFeature(encoder=encoder) if encoder is not None else TextFeature()
    return name, spec


def _absolute(path: str) -> str:
    return str(Path(path).expanduser().absolute())


def add_features(
    path: Path, modality: str, spec: FeatureSpec, *, missing: bool = False, force: bool = False
) -> str:
    """Make a modality and put it into the data folder at `path`; returns a line that says what is there now.

    A modality of that name is left alone unless `force` replaces it or `missing` adds the items it lacks.
    Raises `FindRecError` for everything that is wrong with folder, files or encoder; the folder is then as it
    was, and vectors that were made are used again by the next call.
    """
    begun = time.monotonic()
    folder = DataFolder.open(path)
    entry = next((e for e in folder.manifest.features if e.modality == modality), None)
    before = None
    if entry is not None and missing:
        before = Before(entry, folder.feature(modality))
    elif entry is not None and not force:
        raise FindRecError(
            f"{path} has vectors {modality!r} already (by {entry.encoder}, {entry.missing:,} items without). "
            "--missing adds these items, --force makes all anew, --modality gives another name"
        )
    scratch = scratch_of(path)
    made = make_feature(modality, spec, folder.items, path, scratch=scratch, before=before)
    after = add_feature(path, made)
    shutil.rmtree(scratch, ignore_errors=True)
    table = after.feature(modality)
    with_it = int(np.count_nonzero(table.present))
    return (
        f"ready: {path}: {modality} [{len(table):,}, {table.dim}] by {made.feature.encoder}; {with_it:,} of "
        f"{after.num_items:,} items have it ({format_seconds(time.monotonic() - begun)})"
    )
