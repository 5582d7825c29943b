"""GRU4Rec: gated recurrent units over item ids (Hidasi et al., arXiv 1511.06939 and 1706.03847).

README.md in this folder says what is the papers' and what differs.
"""

from __future__ import annotations

from findrec.models.base import DataFacts
from findrec.models.gru4rec.config import GRU4RecConfig
from findrec.models.gru4rec.layers import GRULayers
from findrec.models.history_model import RecurrentModel


class GRU4Rec(RecurrentModel):
    """GRUs over item ids; modalities are ignored."""

    Config = GRU4RecConfig

    def add_layers(self, facts: DataFacts) -> None:
        """See `HistoryModel`."""
        config: GRU4RecConfig = self.config
        self.stream = GRULayers(config.dim, config.hidden or config.dim, config.layers, config.dropout)
