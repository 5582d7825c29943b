"""A sequence model trained for seconds on small data, to test what it claims to do."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from planted import Silent, make_config
from torch import Tensor

from findrec.datasets.batches.catalogue import Catalogue
from findrec.datasets.folder.data_folder import DataFolder
from findrec.evaluation.metrics.metrics import Ranks
from findrec.evaluation.protocol import RankingProtocol
from findrec.evaluation.ranking.evaluate import rank_split
from findrec.evaluation.scoring.inner_product import ModelScorer
from findrec.evaluation.validation import validate
from findrec.tables.base import ITEMS
from findrec.training.build import build_catalogue, build_tables, build_tower_model
from findrec.training.loop import run_training
from findrec.training.tower import PlainTower
from findrec.training.worker import Worker

MAX_LENGTH = 16


@dataclass(frozen=True)
class Trained:
    """A trained model with the data it was trained on."""

    model: Any
    rows_Vw: Tensor
    catalogue: Catalogue
    folder: DataFolder

    def ranks(self, catalogue: Catalogue | None = None) -> Ranks:
        """The ranks of the test targets."""
        scorer = ModelScorer(
            self.model,
            self.rows_Vw,
            catalogue or self.catalogue,
            max_length=MAX_LENGTH,
            device="cpu",
            name="model",
        )
        protocol = RankingProtocol(users_per_block=100, max_length=MAX_LENGTH)
        return rank_split(scorer, self.folder, "test", protocol)

    def hits(self, k: int = 1, catalogue: Catalogue | None = None) -> float:
        """The share of the test targets within the first k items."""
        return float((self.ranks(catalogue).rank <= k).mean())


def train_model(
    folder: DataFolder, path: Path, model: Mapping[str, Any], *, epochs: int = 12, **training: Any
) -> Trained:
    """Train a model on a data folder as a run does; checkpoints are written to `path`."""
    tree = make_config(epochs=epochs, eval_every=epochs, **training).model_dump(mode="json")
    tree["model"] = {"dim": 32, "dropout": 0.0, "repeat": False} | model
    config = type(make_config()).model_validate(tree)
    torch.manual_seed(0)
    network, tables = build_tower_model(config, folder), build_tables(config, folder)
    tower = PlainTower(network, config.training.optim)
    run_training(config, folder, path, tower, tables, worker=Worker(), validate=validate, log=Silent())
    return Trained(network.eval(), tables[ITEMS].weight, build_catalogue(config, folder), folder)
