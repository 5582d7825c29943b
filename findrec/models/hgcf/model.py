"""HGCF: users and items as points of the hyperboloid, smoothed along the graph of their interactions.

Sun et al. 2021, "HGCF: Hyperbolic Graph Convolution Networks for Collaborative Filtering",
doi 10.1145/3442381.3450101.
"""

from __future__ import annotations

from findrec.models.hgcf.config import HGCFConfig
from findrec.models.hyperbolic_graph_model import HyperbolicGraphModel


class HGCF(HyperbolicGraphModel):
    """See `HyperbolicGraphModel`, which is this model."""

    Config = HGCFConfig
