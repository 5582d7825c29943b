"""Which models there are, and how one is made from its configuration."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Protocol

from findrec.config import ModelConfig
from findrec.errors import FindRecError, suggest
from findrec.models.base import SequenceModel
from findrec.models.findrec import FindRec
from findrec.models.sasrec import SASRec


class ModelClass(Protocol):
    """The constructor every model shares."""

    def __call__(
        self,
        config: ModelConfig,
        *,
        feature_dims: Mapping[str, int],
        repeat: bool,
        max_length: int,
        num_event_types: int = 0,
    ) -> SequenceModel: ...


MODELS: dict[str, ModelClass] = {"findrec": FindRec, "sasrec": SASRec}


def build_model(
    config: ModelConfig,
    *,
    feature_dims: Mapping[str, int],
    repeat: bool,
    max_length: int,
    num_event_types: int = 0,
) -> SequenceModel:
    """A new model, initialised from torch's global generator.

    `feature_dims` gives the width of each modality that is used (models of ids alone ignore it), `repeat`
    asks for a repeat head, `max_length` is the longest history the model will be given, in events;
    `num_event_types` above 0 makes the type of each event an input. Raises `FindRecError` for a
    model that is not registered.
    """
    if config.name not in MODELS:
        raise FindRecError(
            f"model.name={config.name!r} is not a model of this version{suggest(config.name, MODELS)} "
            f"(there: {', '.join(sorted(MODELS))})"
        )
    return MODELS[config.name](
        config,
        feature_dims=feature_dims,
        repeat=repeat,
        max_length=max_length,
        num_event_types=num_event_types,
    )
