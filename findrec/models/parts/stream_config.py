"""Configuration of the sequence layers in `findrec.models.parts.streams`."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from findrec.schema import Part, may_change


class StreamConfig(Part):
    """The sequence layers."""

    kind: Literal["mamba", "gru", "transformer"] = "mamba"
    layers: int = Field(2, ge=1)
    heads: int = Field(2, ge=1)  # transformer only
    d_state: int = Field(16, ge=1)
    d_conv: int = Field(4, ge=2)
    expand: int = Field(2, ge=1)
    scan: Literal["auto", "reference", "torch", "cpp", "triton", "mamba_ssm"] = may_change(
        "warm_start", "auto"
    )
