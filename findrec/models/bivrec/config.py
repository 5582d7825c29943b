"""Configuration of BiVRec: its interests, and what the two views learn from each other."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from typing import ClassVar, Literal

from pydantic import Field, field_validator, model_validator

from findrec.models.config import SequenceConfig
from findrec.schema import Part, may_change


class InterestsConfig(Part):
    """The decomposition of a history into interests (see `interests.py`)."""

    number: int = Field(4, ge=1)  # interests of a user; 1 is an ablation
    # soft: events are shared among interests. hard: each event belongs to one (straight-through gradients),
    # which changes in jumps, so that results can depend on rounding.
    assignment: Literal["soft", "hard"] = "soft"
    noise: float = Field(1.0, ge=0)  # of the Gumbel noise on assignments in training; 0: none


class LossesConfig(Part):
    """Weights of the losses beside that of the catalogue, 0 switches one off (see `losses.py`)."""

    maximum: float = Field(1.0, ge=0)  # the score that items are ranked by, the maximum over interests
    overall: float = Field(0.1, ge=0)  # the views of one user, as a whole, are alike
    allocation: float = Field(0.1, ge=0)  # the views allocate events to the same interests
    views: float = Field(0.1, ge=0)  # each view recommends by itself
    temperature: float = Field(0.07, gt=0)
    rows: int = Field(512, ge=2)  # target positions of a microbatch that are compared


class BiVRecConfig(SequenceConfig):
    """Configuration of the network and its ablations."""

    implementation: ClassVar[str] = "findrec.models.bivrec.model:BiVRec"

    name: Literal["bivrec"] = "bivrec"
    repeat: bool = False
    modalities: list[str] | Literal["all"] = "all"
    layers: int = Field(2, ge=1)
    heads: int = Field(2, ge=1)
    scales: tuple[int, ...] = (2, 4)  # lengths of patches that are added to events; empty: an ablation
    gaussian: bool = True  # attention weights fall with the distance; false: an ablation
    interests: InterestsConfig = InterestsConfig()
    losses: LossesConfig = may_change("warm_start", LossesConfig())

    @field_validator("scales")
    @classmethod
    def _scales(cls, scales: tuple[int, ...]) -> tuple[int, ...]:
        if any(scale < 2 for scale in scales) or len(set(scales)) < len(scales):
            raise ValueError(
                f"scales={list(scales)} must be different numbers of events, each at least 2: single "
                "events are always there"
            )
        return scales

    @model_validator(mode="after")
    def _check(self) -> BiVRecConfig:
        if self.dim % self.heads:
            raise ValueError(
                f"dim={self.dim} is not a multiple of heads={self.heads}: each attention head takes an equal "
                "part of the width; change one of them"
            )
        return self

    @property
    def content(self) -> Literal["all"] | Sequence[str]:
        """See `ModelConfig`."""
        return self.modalities

    def vector_dim(self, modalities: Collection[str]) -> int:
        """See `ModelConfig`: a part for each view."""
        return self.dim * (2 if modalities else 1)

    @property
    def scores_content(self) -> bool:
        """See `ModelConfig`: items are scored by their id and by their content."""
        return True
