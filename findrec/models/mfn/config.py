"""Configuration of MFN: what decides the attention weights."""

from __future__ import annotations

from collections.abc import Sequence
from typing import ClassVar, Literal

from pydantic import Field, model_validator

from findrec.models.config import SequenceConfig


class MFNConfig(SequenceConfig):
    """Configuration of the network and its ablations."""

    implementation: ClassVar[str] = "findrec.models.mfn.model:MFN"

    name: Literal["mfn"] = "mfn"
    repeat: bool = False
    modalities: list[str] | Literal["all"] = "all"
    layers: int = Field(2, ge=1)
    heads: int = Field(2, ge=1)
    # What queries and keys are made of: the content of items, their ids (an ablation), or the sum of both.
    attend: Literal["content", "ids", "both"] = "content"

    @model_validator(mode="after")
    def _check(self) -> MFNConfig:
        if self.dim % self.heads:
            raise ValueError(
                f"dim={self.dim} is not a multiple of heads={self.heads}: each attention head takes an equal "
                "part of the width; change one of them"
            )
        if self.attend != "ids" and not self.modalities:
            raise ValueError(
                f"attend={self.attend!r} needs content to attend by, but modalities is empty: name some, or "
                "set attend=ids"
            )
        return self

    @property
    def content(self) -> Literal["all"] | Sequence[str]:
        """See `ModelConfig`."""
        return () if self.attend == "ids" else self.modalities
