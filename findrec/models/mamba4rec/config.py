"""Configuration of Mamba4Rec."""

from __future__ import annotations

from typing import ClassVar, Literal

from pydantic import Field

from findrec.models.config import SequenceConfig
from findrec.models.parts.stream_config import StreamConfig


class LayersConfig(StreamConfig):
    """The layers, with the published sizes; `heads` has no effect."""

    kind: Literal["mamba"] = "mamba"
    layers: int = Field(1, ge=1)
    d_state: int = Field(32, ge=1)


class Mamba4RecConfig(SequenceConfig):
    """Sizes of the Mamba layers over item ids."""

    implementation: ClassVar[str] = "findrec.models.mamba4rec.model:Mamba4Rec"

    name: Literal["mamba4rec"] = "mamba4rec"
    repeat: bool = False
    stream: LayersConfig = LayersConfig()
