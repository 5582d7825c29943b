"""Configuration of HGCF."""

from __future__ import annotations

from typing import ClassVar, Literal

from findrec.models.parts.hyperbolic_config import HyperbolicGraphConfig


class HGCFConfig(HyperbolicGraphConfig):
    """Sizes of the graph convolution; `dim` counts the time-like coordinate, so rows are narrower by one."""

    implementation: ClassVar[str] = "findrec.models.hgcf.model:HGCF"

    name: Literal["hgcf"] = "hgcf"
