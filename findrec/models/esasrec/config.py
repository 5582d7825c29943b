"""Configuration of eSASRec."""

from __future__ import annotations

from typing import ClassVar, Literal

from pydantic import Field

from findrec.models.config import SequenceConfig


class ESASRecConfig(SequenceConfig):
    """Sizes of the LiGR layers over item ids."""

    implementation: ClassVar[str] = "findrec.models.esasrec.model:ESASRec"

    name: Literal["esasrec"] = "esasrec"
    repeat: bool = False
    layers: int = Field(2, ge=1)
    heads: int = Field(1, ge=1)
    feed_factor: int = Field(4, ge=1)  # width of the position-wise networks, as a multiple of dim
