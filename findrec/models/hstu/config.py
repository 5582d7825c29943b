"""Configuration of HSTU."""

from __future__ import annotations

from typing import ClassVar, Literal

from pydantic import Field

from findrec.models.config import SequenceConfig


class HSTUConfig(SequenceConfig):
    """Sizes of the layers over item ids, the times they read, and how items are scored."""

    implementation: ClassVar[str] = "findrec.models.hstu.model:HSTU"

    name: Literal["hstu"] = "hstu"
    dim: int = Field(50, ge=4)
    repeat: bool = False
    layers: int = Field(2, ge=1)
    heads: int = Field(1, ge=1)
    # Bias of attention by the time between events. past: from each event to the ones before it. target: from
    # the time of the prediction, as in the public code, which other models do not know. none: positions only.
    times: Literal["none", "past", "target"] = "past"
    # Scores are cosines divided by it; null: inner products of a layer-normalised user vector.
    temperature: float | None = Field(0.05, gt=0)
