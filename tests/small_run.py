"""A small data folder with repeats, ties in popularity and items without training events."""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from planted import planted_folder, planted_run

from findrec.datasets.folder.data_folder import DataFolder
from findrec.datasets.folder.in_memory import write_data_folder
from findrec.files import sha256_file
from findrec.training.runs import read_run_config

NUM_ITEMS = 40


@pytest.fixture(scope="session")
def histories() -> list[list[int]]:
    """30 users, 4 to 24 events over items 1..36 (37..40 never occur), popular and own items more often."""
    rng = np.random.default_rng(0)
    weight = 1.0 / np.arange(1, 37)
    made = []
    for _ in range(30):
        own = rng.choice(36, size=8, replace=False, p=weight / weight.sum()) + 1
        made.append([int(i) for i in rng.choice(own, size=int(rng.integers(4, 25)))])
    return made


@pytest.fixture(scope="session")
def folder(histories: list[list[int]], tmp_path_factory: pytest.TempPathFactory) -> DataFolder:
    """The histories as a data folder, with titles and 6-dimensional text features (two items have none)."""
    features = np.random.default_rng(1).standard_normal((NUM_ITEMS, 6)).astype(np.float32)
    features[[4, 11]] = np.nan
    path: Path = tmp_path_factory.mktemp("data") / "small"
    titles = [f"<b>film</b> & {v}" for v in range(1, NUM_ITEMS + 1)]
    return write_data_folder(path, histories, texts=titles, features={"text": features}, num_items=NUM_ITEMS)


def with_columns(data: DataFolder, more: Mapping[str, pa.Array]) -> DataFolder:
    """The folder, changed on disk, with further or other columns of the items."""
    items = pq.read_table(data.path / "items.parquet")
    items = items.drop_columns([name for name in more if name in items.column_names])
    for name, column in more.items():
        items = items.append_column(name, column)
    pq.write_table(items, data.path / "items.parquet")
    manifest = data.path / "manifest.json"
    tree = json.loads(manifest.read_text())
    tree["files"]["items.parquet"] = sha256_file(data.path / "items.parquet")
    manifest.write_text(json.dumps(tree))
    return DataFolder.open(data.path)


@pytest.fixture(scope="session")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A trained run of the planted data with a repeat-consumption bonus.

    Items are of three categories, and item v costs v and is available from the v-th minute.
    """
    home: Path = tmp_path_factory.mktemp("home")
    data = planted_folder(home / "data", num_users=60)
    ids = range(1, data.num_items + 1)
    more = {
        "category": pa.array([f"third {v % 3}" for v in ids]),
        "price": pa.array([float(v) for v in ids]),
        "available_from": pa.array([60 * v for v in ids]),
    }
    return Path(planted_run(home / "runs" / "tiny", with_columns(data, more), model={"repeat": True}))


@pytest.fixture(scope="session")
def data(trained: Path) -> DataFolder:
    """What it was trained on."""
    return DataFolder.open(str(read_run_config(trained).data.folder))


@pytest.fixture
def run(trained: Path, tmp_path: Path) -> Path:
    """A copy of it that a test may change."""
    return Path(shutil.copytree(trained, tmp_path / "runs" / "tiny"))
