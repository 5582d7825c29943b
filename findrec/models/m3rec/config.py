"""Configuration of M3Rec: Mamba layers that id and content share."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from typing import ClassVar, Literal

from pydantic import Field, field_validator

from findrec.models.config import SequenceConfig
from findrec.models.parts.stream_config import StreamConfig


class LayersConfig(StreamConfig):
    """The Mamba layers, with the published sizes; `heads` has no effect."""

    d_state: int = Field(32, ge=1)


class M3RecConfig(SequenceConfig):
    """Configuration of the network and its ablations."""

    implementation: ClassVar[str] = "findrec.models.m3rec.model:M3Rec"

    name: Literal["m3rec"] = "m3rec"
    repeat: bool = False
    modalities: list[str] | Literal["all"] = "all"
    stream: LayersConfig = LayersConfig()
    shared: bool = True  # one set of Mamba layers for id and content; false: one each, an ablation
    weights: Literal["learned", "equal"] = "learned"  # of the modalities in the score

    @field_validator("stream")
    @classmethod
    def _mamba(cls, stream: LayersConfig) -> LayersConfig:
        if stream.kind != "mamba":
            raise ValueError(f"stream.kind={stream.kind!r} is not possible here: the layers are kind=mamba")
        return stream

    @property
    def content(self) -> Literal["all"] | Sequence[str]:
        """See `ModelConfig`."""
        return self.modalities

    def vector_dim(self, modalities: Collection[str]) -> int:
        """See `ModelConfig`: a part for the id and for each modality."""
        return self.dim * (1 + len(modalities))

    @property
    def scores_content(self) -> bool:
        """See `ModelConfig`: an item is scored by its id and by each modality."""
        return True
