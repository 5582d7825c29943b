"""Configuration of SASRec."""

from __future__ import annotations

from typing import ClassVar, Literal

from pydantic import Field

from findrec.models.config import SequenceConfig


class SASRecConfig(SequenceConfig):
    """Sizes of the Transformer over item ids."""

    implementation: ClassVar[str] = "findrec.models.sasrec.model:SASRec"

    name: Literal["sasrec"] = "sasrec"
    layers: int = Field(2, ge=1)
    heads: int = Field(2, ge=1)
