"""Configuration of GRU4Rec."""

from __future__ import annotations

from typing import ClassVar, Literal

from pydantic import Field

from findrec.models.config import SequenceConfig


class GRU4RecConfig(SequenceConfig):
    """Sizes of the GRUs over item ids."""

    implementation: ClassVar[str] = "findrec.models.gru4rec.model:GRU4Rec"

    name: Literal["gru4rec"] = "gru4rec"
    dim: int = Field(128, ge=4)
    repeat: bool = False
    layers: int = Field(1, ge=1)
    hidden: int | None = Field(None, ge=1)  # width of the states; null: dim, without a projection after them
