"""A small data folder with repeats, ties in popularity and items nobody was trained on."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from findrec.datasets.folder import DataFolder
from findrec.datasets.memory import write_data_folder

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
