"""The first stage of HDRM, which gives users and items their places in hyperbolic space."""

from __future__ import annotations

from findrec.models.hdrm.config import EncoderStage
from findrec.models.hyperbolic_graph_model import HyperbolicGraphModel


class Encoder(HyperbolicGraphModel):
    """See `HyperbolicGraphModel`."""

    Config = EncoderStage
