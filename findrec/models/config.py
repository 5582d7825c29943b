"""Base classes of model configurations. No module named `config` imports torch.

The keys of a model are the fields of its class in `findrec/models/<name>/config.py`. `may_change` (see
`findrec.schema`) marks keys that may differ when a run is resumed or started from another run's weights.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar, Literal

from pydantic import Field

from findrec.schema import Part, may_change

# Replaces the name of a model in results and folder names, to distinguish it from another.
LABEL = Field(None, pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$")


@dataclass(frozen=True)
class StageSpec:
    """One stage of the training of a model.

    Attributes:
        name: name of the stage; empty for the last stage, which is the model that is ranked.
        model: configuration of the model trained in this stage.
        needs: names of earlier stages whose best checkpoints this one reads (`DataFacts.artifacts`).
        training: keys of the `training` section that differ in this stage; a dict has keys of a part of it,
            such as `{"optim": {"lr": 0.01}}`.
        continues: one of `needs` that has the same weights and item rows, from which this stage starts; a
            `training.warm_start` of the run takes precedence.
    """

    name: str
    model: ModelConfig
    needs: tuple[str, ...] = ()
    training: Mapping[str, Any] = field(default_factory=dict)
    continues: str | None = None


class ModelConfig(Part):
    """Base class of model configurations; the key `name` selects the class.

    Class variables hold the import paths (`module:Class`) of the model and of the `Scorer` that ranks items
    with it, so that reading a configuration does not import torch. A scorer takes the arguments of
    `ModelScorer`, which ranks by inner products with one vector or several vectors per user; those that set
    `reads_all_tables` get the rows of all tables.
    """

    implementation: ClassVar[str]
    scorer: ClassVar[str] = "findrec.evaluation.scoring.inner_product:ModelScorer"
    ranked: ClassVar[bool] = True  # whether the model ranks items; False for preparatory stages

    name: str
    label: str | None = LABEL
    dim: int = Field(64, ge=4)  # width of the item table and of user vectors

    @property
    def title(self) -> str:
        """The name of the model in results."""
        return self.label or self.name.rpartition(":")[2]

    @property
    def has_default_scorer(self) -> bool:
        """Whether items are ranked by the inner product, which sharded item tables support."""
        return self.scorer == ModelConfig.scorer

    @property
    def content(self) -> Literal["all"] | Sequence[str]:
        """The modalities that are inputs of the model; by default none."""
        return ()

    def vector_dim(self, modalities: Collection[str]) -> int:
        """The width of user vectors and of the vectors that items are scored by.

        `modalities` are those of `content` that the data has.
        """
        return self.dim

    @property
    def scores_content(self) -> bool:
        """Whether scores of items also depend on their features, so that new items can be ranked."""
        return False

    @property
    def item_vectors_are_random(self) -> bool:
        """Whether the vectors that items are scored by are random in training."""
        return False

    @property
    def event_types(self) -> bool:
        """Whether event types (view, purchase, ...) are an input."""
        return False

    @property
    def repeat_consumption(self) -> bool:
        """Whether items of the user's history get a learned score bonus."""
        return False

    def stages(self) -> tuple[StageSpec, ...]:
        """The training stages in order; the last one trains the model itself."""
        return (StageSpec("", self),)


class SequenceConfig(ModelConfig):
    """Keys of models that read the history of a user as a sequence."""

    dropout: float = may_change("warm_start", 0.2, ge=0, lt=1)
    gaps: bool = False  # log-bucketed time gaps as an input
    events: bool = False  # event types (view, purchase, ...) as an input
    wait: bool = False  # log-bucketed time between the last event and the prediction as an input
    # Repeat consumption: learns whether users consume items again (groceries) or not (films).
    repeat: bool = True

    @property
    def event_types(self) -> bool:
        """See `ModelConfig`."""
        return self.events

    @property
    def repeat_consumption(self) -> bool:
        """See `ModelConfig`."""
        return self.repeat
