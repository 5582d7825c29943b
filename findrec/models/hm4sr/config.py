"""Configuration of HM4SR: its experts and its auxiliary tasks."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from typing import ClassVar, Literal

from pydantic import Field, model_validator

from findrec.models.config import SequenceConfig
from findrec.schema import Part, may_change


class InteractiveConfig(Part):
    """Experts over id and content of an item together (see `experts.py`)."""

    experts: int = Field(4, ge=0)  # 0: none, an ablation


class TemporalConfig(Part):
    """Experts selected by the time of an event (see `experts.py`, `times.py`)."""

    experts: int = Field(4, ge=0)  # 0: none, an ablation; times are then not an input
    # What of the time selects them: the interval to the previous event, the calendar, or both.
    reads: Literal["both", "interval", "calendar"] = "both"
    per_octave: int = Field(8, ge=1)  # buckets of intervals from one length to its double; public code: 100


class TasksConfig(Part):
    """Weights of the auxiliary tasks, 0 switches one off (see `tasks.py`)."""

    id_contrast: float = Field(1.0, ge=0)
    id_temperature: float = Field(0.2, gt=0)
    placeholder_contrast: float = Field(1.0, ge=0)
    placeholder_temperature: float = Field(1.0, gt=0)
    placeholders: float = Field(0.3, gt=0, lt=1)  # share of the events replaced by their time
    category: float = Field(1.0, ge=0)  # needs `categories`
    rows: int = Field(512, ge=2)  # target positions of a microbatch that the contrasts compare


class HM4SRConfig(SequenceConfig):
    """Configuration of the network and its ablations."""

    implementation: ClassVar[str] = "findrec.models.hm4sr.model:HM4SR"

    name: Literal["hm4sr"] = "hm4sr"
    repeat: bool = False
    modalities: list[str] | Literal["all"] = "all"
    # A modality whose values are nonzero for the categories of an item, [V, C]: a target, never an input.
    categories: str | None = None
    layers: int = Field(2, ge=1)
    heads: int = Field(2, ge=1)
    interactive: InteractiveConfig = InteractiveConfig()
    temporal: TemporalConfig = TemporalConfig()
    tasks: TasksConfig = may_change("warm_start", TasksConfig())

    @model_validator(mode="after")
    def _check(self) -> HM4SRConfig:
        if self.dim % self.heads:
            raise ValueError(
                f"dim={self.dim} is not a multiple of heads={self.heads}: each attention head takes an equal "
                "part of the width; change one of them"
            )
        if self.modalities != "all" and self.categories in self.modalities:
            raise ValueError(
                f"categories={self.categories!r} is also in modalities: what is to be predicted must not be "
                "an input; remove it from modalities"
            )
        return self

    @property
    def content(self) -> Literal["all"] | Sequence[str]:
        """See `ModelConfig`."""
        if self.modalities == "all" or self.categories is None:
            return self.modalities
        return [*self.modalities, self.categories]

    def inputs(self, names: Collection[str]) -> list[str]:
        """Those of the modalities that are read with the history."""
        return [name for name in names if name != self.categories]

    def vector_dim(self, modalities: Collection[str]) -> int:
        """See `ModelConfig`: a part for the id and for each modality."""
        return self.dim * (1 + len(self.inputs(modalities)))

    @property
    def scores_content(self) -> bool:
        """See `ModelConfig`: an item is scored by its id and by each modality."""
        return True
