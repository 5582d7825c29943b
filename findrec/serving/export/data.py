"""Copies the parts of a data folder that a trained model needs: items, features, and users on request."""

from __future__ import annotations

import shutil
from collections.abc import Collection
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from findrec.datasets.folder.data_folder import ALWAYS, DataFolder
from findrec.datasets.folder.manifest import write_manifest
from findrec.datasets.folder.tables import ITEMS_FILE, USERS_FILE
from findrec.errors import FindRecError
from findrec.files import sha256_file


def copy_data(data: DataFolder, target: Path, modalities: Collection[str], *, users: bool) -> None:
    """Write a data folder with the items of `data`, some of its features and, with `users`, its users.

    Without them it has no user and no event. The manifest keeps what identifies the data and the statistics
    of its events, but not the places of the source files.

    Raises:
        FindRecError: if a file differs from the manifest, or with `users` for remote data.
    """
    manifest = data.manifest
    if users and data.remote:
        raise FindRecError(
            f"the histories of {data.location} are remote: copy the folder to this machine and set "
            "data.folder in "
            "the run's config.yaml to it, or export without users"
        )
    target.mkdir()
    features = [entry for entry in manifest.features if entry.modality in modalities]
    files = {entry.file: _copied(data, target, entry.file, manifest.files[entry.file]) for entry in features}
    files[ITEMS_FILE] = _copy_items(data, target)
    changes: dict[str, Any] = {"sources": [], "features": features, "files": files}
    if users:
        files[USERS_FILE] = _copied(data, target, USERS_FILE, manifest.files[USERS_FILE])
        for shard in manifest.shards:
            _copied(data, target, shard.name, shard.sha256)
    else:
        pq.write_table(pq.read_schema(data.path / USERS_FILE).empty_table(), target / USERS_FILE)
        files[USERS_FILE] = sha256_file(target / USERS_FILE)
        changes |= {"num_users": 0, "num_events": 0, "longest": 0, "shards": []}
    write_manifest(target, manifest.model_copy(update=changes))


def _copied(data: DataFolder, target: Path, name: str, sha256: str) -> str:
    """Copy one file; raises `FindRecError` unless its hash is `sha256`."""
    (target / name).parent.mkdir(parents=True, exist_ok=True)
    shutil.copyfile(data.path / name, target / name)
    if sha256_file(target / name) != sha256:
        raise FindRecError(
            f"{data.path / name} was altered: its sha256 is not the one in manifest.json. findrec verify "
            f"{data.path} checks all files"
        )
    return sha256


def _copy_items(data: DataFolder, target: Path) -> str:
    """Copy the item table; folders of older versions get the times from which items are available."""
    if data.item_column("available_from") is not None:
        return _copied(data, target, ITEMS_FILE, data.manifest.files[ITEMS_FILE])
    times = [None if time == ALWAYS else time for time in data.available_from[1:].tolist()]
    table = data.items.append_column("available_from", pa.array(times, pa.int64()))
    pq.write_table(table, target / ITEMS_FILE)
    return sha256_file(target / ITEMS_FILE)
