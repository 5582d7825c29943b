"""`findrec verify`: check that a data folder is complete, unaltered and valid.

Hashes show that nothing has changed since the folder was written. The contents are validated as well, as the
folder may come from an untrusted source or a faulty program.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch

from findrec.datasets.folder.data_folder import DataFolder
from findrec.datasets.folder.manifest import repair_hint
from findrec.errors import FindRecError
from findrec.progress import progress

ROWS_AT_ONCE = 1 << 16


def check_folder(location: Path | str) -> DataFolder:
    """Check a whole data folder: hashes, every event of every shard, every value of every feature table.

    All shards of a remote folder are fetched. Raises `FindRecError` for the first error.
    """
    folder = DataFolder.open(location, verify=True)
    _check_events(folder)
    _check_items(folder)
    for modality in folder.modalities:
        _check_feature(folder, modality)
    return folder


def _check_events(folder: DataFolder) -> None:
    manifest = folder.manifest
    num_types = len(manifest.event_types)
    with progress("check events", total=manifest.num_events, unit="events") as bar:
        for entry in manifest.shards:
            for begin in range(entry.first_user, entry.first_user + entry.users, ROWS_AT_ONCE):
                rows = np.arange(begin, min(begin + ROWS_AT_ONCE, entry.first_user + entry.users))
                read = folder.histories(rows)  # raises for unknown items and descending times
                if read.event is not None and np.any((read.event < -1) | (read.event >= num_types)):
                    raise FindRecError(
                        f"shard {entry.name} of {folder.location} has an event type that manifest.json does "
                        f"not list. {repair_hint(manifest.recipe)}"
                    )
                bar.advance(len(read.item))
            if int(folder.length[entry.first_user : entry.first_user + entry.users].sum()) != entry.events:
                raise FindRecError(
                    f"shard {entry.name} of {folder.location} does not have the {entry.events:,} events "
                    f"stated in manifest.json. {repair_hint(manifest.recipe)}"
                )


def _check_items(folder: DataFolder) -> None:
    ids = folder.items.column("item").to_numpy()
    if not np.array_equal(ids, np.arange(1, folder.num_items + 1)):
        raise FindRecError(
            f"{folder.path / 'items.parquet'} does not have the ids 1..{folder.num_items} in order. "
            f"{repair_hint(folder.manifest.recipe)}"
        )


def _check_feature(folder: DataFolder, modality: str) -> None:
    table = folder.feature(modality)
    entry = next(entry for entry in folder.manifest.features if entry.modality == modality)
    file, hint = folder.path / entry.file, repair_hint(folder.manifest.recipe)
    if table.present[0] or int((~table.present[1:]).sum()) != entry.missing:
        raise FindRecError(
            f"{file} does not lack exactly {entry.missing} items as manifest.json says. {hint}"
        )
    for begin in range(0, len(table), ROWS_AT_ONCE):
        rows = table.rows(torch.arange(begin, min(begin + ROWS_AT_ONCE, len(table))))
        finite = rows.values.isfinite().all(dim=1)
        if not finite.all():
            raise FindRecError(
                f"{file}: the features of item {begin + int(finite.int().argmin())} are not finite (NaN or "
                f"infinity). {hint}"
            )
        if rows.values[~rows.present].any():
            raise FindRecError(f"{file}: an item without this modality has features. {hint}")
