"""Mamba4Rec: selective state space layers over item ids (Liu et al. 2024, arXiv 2403.03900).

README.md in this folder says what is the paper's and what differs.
"""

from __future__ import annotations

import torch
from torch import nn

from findrec.models.base import DataFacts
from findrec.models.history_model import RecurrentModel
from findrec.models.mamba4rec.config import Mamba4RecConfig
from findrec.models.mamba4rec.layers import Mamba4RecLayers
from findrec.ops.scan.selective_scan import scan_backend


class Mamba4Rec(RecurrentModel):
    """Mamba layers over item ids; modalities are ignored."""

    Config = Mamba4RecConfig

    def add_layers(self, facts: DataFacts) -> None:
        """See `HistoryModel`."""
        config: Mamba4RecConfig = self.config
        self.stream = Mamba4RecLayers(config.dim, config.dropout, config.stream)

    def make_norm(self) -> nn.Module:
        """See `HistoryModel`: the last layer ends with a LayerNorm."""
        return nn.Identity()

    def describe(self, device: torch.device) -> str:
        """See `Model`."""
        return f"scan {scan_backend(device, self.config.stream.scan)}"
