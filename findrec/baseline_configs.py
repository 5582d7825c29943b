"""Configurations of the baselines that need no training. This module does not import torch.

`evaluation.baselines` lists them by name or with their keys, besides models, which are trained first:
`[popularity, {name: cooccurrence, window: 5}, {name: <a model>, dim: 32}]`.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, ClassVar, Literal

from pydantic import Field, PlainValidator, SerializeAsAny

from findrec.errors import suggest
from findrec.models.config import LABEL, ModelConfig
from findrec.models.configs import CONFIGS, choose_model
from findrec.schema import Part


class BaselineConfig(Part):
    """Base class of baseline configurations; `implementation` is an import path, `module:Class`."""

    implementation: ClassVar[str]

    name: str
    label: str | None = LABEL

    @property
    def title(self) -> str:
        """The name of the baseline in results."""
        return self.label or self.name

    @property
    def content(self) -> tuple[str, ...]:
        """The modalities that the data must have."""
        return ()

    @property
    def most_items(self) -> int | None:
        """The largest number of items with training events; None: any number."""
        return None


class PopularityConfig(BaselineConfig):
    """Ranks items by their number of training events."""

    implementation: ClassVar[str] = "findrec.evaluation.scoring.baselines:Popularity"

    name: Literal["popularity"] = "popularity"


class OwnFrequentConfig(BaselineConfig):
    """Ranks items of the user's history by their number of events, then all others by popularity."""

    implementation: ClassVar[str] = "findrec.evaluation.scoring.baselines:OwnFrequent"

    name: Literal["own_frequent"] = "own_frequent"


class CooccurrenceConfig(BaselineConfig):
    """Ranks items that occur close to the user's last items in training histories."""

    implementation: ClassVar[str] = "findrec.evaluation.scoring.baselines:Cooccurrence"

    name: Literal["cooccurrence"] = "cooccurrence"
    window: int = Field(10, ge=1)  # largest distance, in events, of a pair that counts
    last: int = Field(10, ge=1)  # latest events of the user that are used
    decay: float = Field(0.8, gt=0, le=1)  # weight of an event relative to that of the next event
    neighbours: int = Field(200, ge=1)  # per item


class ItemKNNConfig(BaselineConfig):
    """Ranks items by their similarity, as sets of users, to the items of the user's history."""

    implementation: ClassVar[str] = "findrec.evaluation.scoring.item_similarity:ItemKNN"

    name: Literal["item_knn"] = "item_knn"
    neighbours: int = Field(100, ge=1)  # per item
    shrink: float = Field(10.0, ge=0)  # added to the denominator of the cosine, against rare items
    decay: float = Field(1.0, gt=0, le=1)  # weight of an event relative to that of the next event


class EASEConfig(BaselineConfig):
    """Ranks items by a linear autoencoder of the user's history with weights in closed form."""

    implementation: ClassVar[str] = "findrec.evaluation.scoring.item_similarity:EASE"

    name: Literal["ease"] = "ease"
    l2: float = Field(250.0, gt=0)  # regularisation of the weights
    max_items: int = Field(20_000, ge=1)  # with training events; more are refused

    @property
    def most_items(self) -> int:
        """See `BaselineConfig`."""
        return self.max_items


class TextKNNConfig(BaselineConfig):
    """Ranks items by the similarity of their features to those of the user's last items."""

    implementation: ClassVar[str] = "findrec.evaluation.scoring.inner_product:TextKNN"

    name: Literal["text_knn"] = "text_knn"
    modality: str = "text"
    last: int = Field(5, ge=1)  # latest events of the user that are used

    @property
    def content(self) -> tuple[str, ...]:
        """See `BaselineConfig`."""
        return (self.modality,)


BASELINES: dict[str, type[BaselineConfig]] = {
    "popularity": PopularityConfig,
    "cooccurrence": CooccurrenceConfig,
    "own_frequent": OwnFrequentConfig,
    "text_knn": TextKNNConfig,
    "item_knn": ItemKNNConfig,
    "ease": EASEConfig,
}


def choose_baseline(given: object) -> BaselineConfig | ModelConfig:
    """Validate `given`, a name or a mapping, as the configuration class selected by its name."""
    if isinstance(given, BaselineConfig | ModelConfig):
        return given
    if isinstance(given, str):
        given = {"name": given}
    if not isinstance(given, Mapping) or not isinstance(name := given.get("name"), str):
        raise ValueError("a baseline must be a name or a mapping with the key `name`")
    if name in BASELINES:
        return BASELINES[name].model_validate(dict(given))
    if name in CONFIGS or ":" in name:
        return choose_model(given)
    known = [*BASELINES, *CONFIGS]
    raise ValueError(
        f"unknown baseline {name!r}{suggest(name, known)} (known: {', '.join(known)}, or the import path of "
        "your model class, module:Class)"
    )


# A model can also be a baseline.
AnyBaseline = Annotated[SerializeAsAny[BaselineConfig | ModelConfig], PlainValidator(choose_baseline)]
