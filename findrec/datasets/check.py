"""`findrec verify`: is a data folder whole, unaltered, and does it hold only what such a folder may hold?

Hashes say that nothing has changed since the folder was made. The contents are looked at as well, because a
folder may have been made by somebody else, or by a program with a mistake.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch

from findrec.datasets.folder import DataFolder
from findrec.datasets.manifest import how_to_mend
from findrec.errors import FindRecError
from findrec.progress import progress

ROWS_AT_ONCE = 1 << 16


def check_folder(place: Path | str) -> DataFolder:
    """Check all of a data folder: hashes, every event of every shard, every value of every feature table.

    At an address all shards are fetched for it. Raises `FindRecError` for the first thing that is wrong.
    """
    folder = DataFolder.open(place, verify=True)
    _check_events(folder)
    _check_items(folder)
    for modality in folder.modalities:
        _check_feature(folder, modality)
    return folder


def _check_events(folder: DataFolder) -> None:
    manifest = folder.manifest
    codes = len(manifest.event_types)
    with progress("check events", total=manifest.num_events, unit="events") as bar:
        for entry in manifest.shards:
            for begin in range(entry.first_user, entry.first_user + entry.users, ROWS_AT_ONCE):
                rows = np.arange(begin, min(begin + ROWS_AT_ONCE, entry.first_user + entry.users))
                read = folder.histories(rows)  # refuses what is outside of the catalogue or goes back in time
                if read.event is not None and np.any((read.event < -1) | (read.event >= codes)):
                    raise FindRecError(
                        f"shard {entry.name} of {folder.location} has an event of a type that manifest.json "
                        f"does not name. {how_to_mend(manifest.recipe)}"
                    )
                bar.advance(len(read.item))
            if int(folder.length[entry.first_user : entry.first_user + entry.users].sum()) != entry.events:
                raise FindRecError(
                    f"shard {entry.name} of {folder.location} has not the {entry.events:,} events that "
                    f"manifest.json says. {how_to_mend(manifest.recipe)}"
                )


def _check_items(folder: DataFolder) -> None:
    ids = folder.items.column("item").to_numpy()
    if not np.array_equal(ids, np.arange(1, folder.num_items + 1)):
        raise FindRecError(
            f"{folder.path / 'items.parquet'} does not have the ids 1..{folder.num_items} in order. "
            f"{how_to_mend(folder.manifest.recipe)}"
        )


def _check_feature(folder: DataFolder, modality: str) -> None:
    table = folder.feature(modality)
    entry = next(entry for entry in folder.manifest.features if entry.modality == modality)
    file, mend = folder.path / entry.file, how_to_mend(folder.manifest.recipe)
    if table.present[0] or int((~table.present[1:]).sum()) != entry.missing:
        raise FindRecError(f"{file} is without other than the {entry.missing} items of manifest.json. {mend}")
    for begin in range(0, len(table), ROWS_AT_ONCE):
        rows = table.rows(torch.arange(begin, min(begin + ROWS_AT_ONCE, len(table))))
        finite = rows.values.isfinite().all(dim=1)
        if not finite.all():
            raise FindRecError(
                f"{file}: the features of item {begin + int(finite.int().argmin())} are not finite (NaN or "
                f"infinity). {mend}"
            )
        if rows.values[~rows.present].any():
            raise FindRecError(f"{file}: an item without this modality has features. {mend}")
