"""Models for tests that need no data folder."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from findrec.datasets.batches.batch import Batch
from findrec.datasets.batches.training_pairs import TrainingPairs
from findrec.models.base import DataFacts, SequenceModel
from findrec.models.config import ModelConfig
from findrec.models.configs import choose_model
from findrec.models.registry import build_model, model_class
from findrec.tables.base import ITEMS


def few_pairs(num_users: int, num_items: int) -> TrainingPairs:
    """Pairs in which user u has the items u + 1, u + 3 and u + 5; later items have no events."""
    user = np.repeat(np.arange(num_users), 3)
    item = user + np.tile([1, 3, 5], num_users)
    assert item.max() <= num_items
    return TrainingPairs(user, item, 3 * np.arange(num_users + 1), np.unique(item))


def make_model(
    config: ModelConfig | Mapping[str, Any],
    feature_dims: Mapping[str, int] | None = None,
    *,
    max_length: int = 20,
    num_items: int = 40,
) -> Any:
    """A model of the configuration, a class of it or a tree of plain values, for five users."""
    facts = DataFacts(
        num_items=num_items,
        num_users=5,
        feature_dims=feature_dims or {},
        max_length=max_length,
        training_pairs=lambda: few_pairs(5, num_items),
    )
    return build_model(choose_model(config), facts)


def row_width(config: ModelConfig, feature_dims: Mapping[str, int]) -> int:
    """The width of the rows of the item table of a model."""
    facts = DataFacts(num_items=1, feature_dims=feature_dims if config.content else {})
    return model_class(config).tables(config, facts)[ITEMS].dim


def training_batch(model: SequenceModel, batch: Batch) -> Batch:
    """The batch that a model is called with in training, where some read the rows of the targets too."""
    return batch.with_targets() if model.reads_targets else batch
