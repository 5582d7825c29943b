"""Models for tests that need no data folder."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from findrec.models.base import DataFacts
from findrec.models.config import ModelConfig
from findrec.models.configs import choose_model
from findrec.models.registry import build_model, model_class
from findrec.tables.base import ITEMS


def make_model(
    config: ModelConfig | Mapping[str, Any],
    feature_dims: Mapping[str, int] | None = None,
    *,
    max_length: int = 20,
    num_items: int = 40,
) -> Any:
    """A model of the configuration, a class of it or a tree of plain values."""
    facts = DataFacts(num_items=num_items, feature_dims=feature_dims or {}, max_length=max_length)
    return build_model(choose_model(config), facts)


def row_width(config: ModelConfig, feature_dims: Mapping[str, int]) -> int:
    """The width of the rows of the item table of a model."""
    facts = DataFacts(num_items=1, feature_dims=feature_dims if config.content else {})
    return model_class(config).tables(config, facts)[ITEMS].dim
