"""Builds the model that a configuration names."""

from __future__ import annotations

from typing import Any

from findrec.errors import FindRecError
from findrec.models.base import DataFacts, Model
from findrec.models.config import ModelConfig
from findrec.models.configs import import_object


def model_class(config: ModelConfig) -> type[Model[Any]]:
    """The class at `config.implementation`; raises `FindRecError` if it is not a model."""
    cls = import_object(config.implementation, "model.name")
    if not (isinstance(cls, type) and issubclass(cls, Model)):
        raise FindRecError(
            f"model.name={config.implementation!r} is not a model class: derive it from "
            "findrec.models.base.SequenceModel (or Model)"
        )
    return cls


def build_model(config: ModelConfig, facts: DataFacts) -> Model[Any]:
    """A new model, initialised from torch's global generator."""
    return model_class(config).build(config, facts)
