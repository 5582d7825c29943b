"""Models over ids learn planted data through the training loop and the ranking that runs use."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
from planted import planted_folder, planted_run

from findrec.datasets.folder.data_folder import DataFolder

MODELS: dict[str, dict[str, Any]] = {
    "esasrec": {"name": "esasrec"},
    "gru4rec": {"name": "gru4rec"},
    "hstu": {"name": "hstu"},
    "hstu, target time": {"name": "hstu", "times": "target"},
    "mamba4rec": {"name": "mamba4rec"},
    "unisrec": {"name": "unisrec", "adaptor_dropout": 0.0},
}


class Validations:
    """A log that keeps NDCG@10 of validations."""

    def __init__(self) -> None:
        self.ndcg: list[float] = []

    def log(self, step: int, epoch: float, values: Mapping[str, float]) -> None:
        """Called by the training loop."""
        if "valid/ndcg@10" in values:
            self.ndcg.append(values["valid/ndcg@10"])


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> DataFolder:
    folder: DataFolder = planted_folder(tmp_path_factory.mktemp("planted") / "data", num_users=100)
    return folder


@pytest.mark.parametrize("label", MODELS)
def test_the_item_that_follows_is_learned(folder: DataFolder, tmp_path: Path, label: str) -> None:
    log = Validations()
    model = {"dim": 32, "dropout": 0.0} | MODELS[label]
    planted_run(tmp_path / "run", folder, model=model, training={"epochs": 6, "optim": {"lr": 0.01}}, log=log)
    assert len(log.ndcg) == 6
    assert log.ndcg[-1] > 0.9
