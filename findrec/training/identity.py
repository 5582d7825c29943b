"""Identifies the data that a run was trained on, and refuses other data in its place.

Item ids are rows of the item table, so a model answers with nonsense on a data folder whose items are others.
Checkpoints record the identity of their data; it is compared whenever a checkpoint is loaded with a folder.
"""

from __future__ import annotations

import hashlib
from collections.abc import Collection
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

from findrec.config import RunConfig
from findrec.datasets.folder.data_folder import DataFolder
from findrec.errors import FindRecError
from findrec.training.build import used_modalities
from findrec.training.checkpoints.checkpoint import CatalogueFingerprint

_TITLES = {
    "event_types": "event types",
    "encoders": "encoders of the features",
    "events": "events",
    "split": "split",
    "vectors": "precomputed vectors",
}


def catalogue_fingerprint(
    config: RunConfig, folder: DataFolder, num_items: int | None = None
) -> CatalogueFingerprint:
    """Identifies the data that the weights of a run depend on.

    These are the raw ids of the first `num_items` items (default: all), the event types and the encoders.
    """
    types = folder.manifest.event_types if config.model.event_types else []
    return {
        "items": _items(folder, folder.num_items if num_items is None else num_items),
        "event_types": list(types),
        "encoders": _encoders(folder, used_modalities(config, folder)),
    }


def _items(folder: DataFolder, size: int) -> list[str]:
    """The number of the first `size` items and the digest of their raw ids."""
    column = folder.item_column("raw")
    assert column is not None
    raw = pa.concat_arrays(column.slice(0, size).cast(pa.large_string()).chunks)
    _, offsets, text = raw.buffers()
    ends = np.frombuffer(offsets, dtype="<i8")[raw.offset : raw.offset + size + 1]
    digest = hashlib.sha256(np.diff(ends).tobytes())  # with the lengths, as the text has no separators
    digest.update(memoryview(text or b"")[ends[0] : ends[-1]])
    return [str(size), digest.hexdigest()]


def _encoders(folder: DataFolder, used: Collection[str]) -> dict[str, str]:
    entries = [entry for entry in folder.manifest.features if entry.modality in used]
    return {entry.modality: entry.weights_sha256 or entry.encoder for entry in entries}


def data_identity(config: RunConfig, folder: DataFolder) -> CatalogueFingerprint:
    """The catalogue fingerprint with the digests of the events, the split and the precomputed vectors."""
    return catalogue_fingerprint(config, folder) | _results(folder, used_modalities(config, folder))


def _results(folder: DataFolder, used: Collection[str]) -> dict[str, Any]:
    manifest = folder.manifest
    # Other vectors are identified by the weights of their encoder, and may be completed later.
    vectors = {
        entry.modality: manifest.files[entry.file]
        for entry in manifest.features
        if entry.modality in used and not entry.weights_sha256
    }
    return {"events": manifest.events_sha256, "split": manifest.split, "vectors": vectors}


def check_identity(folder: DataFolder, saved: CatalogueFingerprint, checkpoint: Path) -> None:
    """Raise `FindRecError` if `folder` is not the data with the identity `saved` in a checkpoint.

    A grown folder with the same items may have later events. Parts that a checkpoint of an earlier version
    does not record are not compared.
    """
    if not saved:
        return
    check_num_items(folder, int(saved["items"][0]), checkpoint)
    if _items(folder, folder.num_items) != saved["items"]:
        raise _other_data(folder, checkpoint, "the items are others, or in another order")
    now: dict[str, Any] = {"encoders": _encoders(folder, saved["encoders"])}
    if saved["event_types"]:
        now["event_types"] = folder.manifest.event_types
    if folder.manifest.parent is None:
        now |= _results(folder, saved["encoders"])
    differing = [_TITLES[key] for key, value in now.items() if value != saved.get(key, value)]
    if differing:
        raise _other_data(folder, checkpoint, f"the {' and the '.join(differing)} differ")


def check_num_items(folder: DataFolder, num_items: int, checkpoint: Path) -> None:
    """Raise `FindRecError` if a checkpoint with `num_items` items does not have those of `folder`."""
    if num_items == folder.num_items:
        return
    problem = f"the model has {num_items:,} items, the data {folder.num_items:,}"
    if folder.manifest.parent is not None and folder.num_items > num_items:
        problem += " (if they were grown, train a new run with training.warm_start set to this one)"
    raise _other_data(folder, checkpoint, problem)


def _other_data(folder: DataFolder, checkpoint: Path, problem: str) -> FindRecError:
    return FindRecError(
        f"{folder.location} is not the data that {checkpoint} was trained on: {problem}. Prepare the earlier "
        "data again (in another folder, with data.folder in the run's config.yaml set to it), or train a new "
        "run on this data. Nothing was changed"
    )
