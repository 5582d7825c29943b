"""eSASRec: LiGR layers over item ids, for a sampled softmax (Tikhonovich et al. 2025, arXiv 2508.06450).

README.md in this folder says what is the paper's and what differs.
"""

from __future__ import annotations

from torch import Tensor, nn

from findrec.datasets.batches.batch import Batch
from findrec.models.base import DataFacts
from findrec.models.esasrec.config import ESASRecConfig
from findrec.models.esasrec.layers import GatedLayer
from findrec.models.history_model import HistoryModel
from findrec.models.parts.transformer import LearnedPositions, check_heads, initialise


class ESASRec(HistoryModel):
    """LiGR layers over item ids and learned positions; modalities are ignored."""

    Config = ESASRecConfig

    def add_layers(self, facts: DataFacts) -> None:
        """See `HistoryModel`; raises `FindRecError` if the heads do not divide the width."""
        config: ESASRecConfig = self.config
        check_heads(config.dim, config.heads, "model.heads")
        self.position = LearnedPositions(facts.max_length, config.dim)
        self.layers = nn.ModuleList(
            [
                GatedLayer(config.dim, config.heads, config.feed_factor, config.dropout)
                for _ in range(config.layers)
            ]
        )
        self.apply(initialise)

    @property
    def longest_history(self) -> int:
        """See `findrec.models.capabilities.LimitedHistory`: the number of learned positions."""
        return self.position.num_embeddings

    def encode(self, x_BLd: Tensor, batch: Batch) -> Tensor:
        """See `HistoryModel`; raises `FindRecError` for a history longer than `longest_history`."""
        x_BLd = self.inputs.drop(x_BLd + self.position(x_BLd.shape[1]))
        for layer in self.layers:
            x_BLd = self.run_layer(layer, x_BLd)
        return x_BLd
