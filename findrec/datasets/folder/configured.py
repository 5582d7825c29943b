"""The data folder that a run's configuration names; imports nothing that prepares data."""

from __future__ import annotations

from pathlib import Path

from findrec.config import DataConfig
from findrec.datasets.folder.data_folder import DataFolder
from findrec.datasets.folder.remote import is_remote
from findrec.paths import resolve


def data_folder_of(config: DataConfig) -> Path | str:
    """Path or URL of a run's data set: `data.folder`, or else `data/<recipe>` in FindRec's home."""
    if config.folder is not None and is_remote(config.folder):
        return config.folder
    return resolve(config.folder or f"data/{Path(config.recipe).stem}")


def open_data_folder(config: DataConfig, *, verify: bool = True) -> DataFolder:
    """Open the existing data set of a run; see `DataFolder.open`."""
    return DataFolder.open(data_folder_of(config), verify=verify, cache_bytes=config.cache_bytes)
