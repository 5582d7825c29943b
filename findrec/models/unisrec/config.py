"""Configuration of UniSRec."""

from __future__ import annotations

from collections.abc import Sequence
from typing import ClassVar, Literal

from pydantic import Field

from findrec.models.config import SequenceConfig


class UniSRecConfig(SequenceConfig):
    """The adaptor of the features, the Transformer over item vectors, and how items are scored."""

    implementation: ClassVar[str] = "findrec.models.unisrec.model:UniSRec"

    name: Literal["unisrec"] = "unisrec"
    repeat: bool = False
    modalities: list[str] | Literal["all"] = Field(["text"])
    # Whether item vectors have a learned part (the row of the table) besides that of the features.
    ids: bool = True
    experts: int = Field(8, ge=1)
    adaptor_dropout: float = Field(0.2, ge=0, lt=1)  # of the features, before the experts
    layers: int = Field(2, ge=1)
    heads: int = Field(2, ge=1)
    # Scores are cosines divided by it; null: inner products of a layer-normalised user vector.
    temperature: float | None = Field(0.07, gt=0)

    @property
    def content(self) -> Literal["all"] | Sequence[str]:
        """See `ModelConfig`."""
        return self.modalities

    @property
    def scores_content(self) -> bool:
        """See `ModelConfig`."""
        return True
