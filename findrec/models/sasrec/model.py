"""SASRec, the reference baseline (Kang & McAuley 2018, arXiv 1808.09781).

A causal Transformer over item ids in its modern form: pre-normalised blocks, GELU, no dropout on attention
weights, and the loss, width and budget of the other models.
"""

from __future__ import annotations

from torch import Tensor, nn

from findrec.datasets.batches.batch import Batch
from findrec.models.base import DataFacts
from findrec.models.history_model import HistoryModel
from findrec.models.parts.transformer import Block, LearnedPositions, check_heads, initialise
from findrec.models.sasrec.config import SASRecConfig


class SASRec(HistoryModel):
    """A causal Transformer over item ids; modalities are ignored."""

    Config = SASRecConfig

    def add_layers(self, facts: DataFacts) -> None:
        """See `HistoryModel`; raises `FindRecError` if the heads do not divide the width."""
        config: SASRecConfig = self.config
        check_heads(config.dim, config.heads, "model.heads")
        self.position = LearnedPositions(facts.max_length, config.dim)
        self.blocks = nn.ModuleList(
            [Block(config.dim, config.heads, config.dropout) for _ in range(config.layers)]
        )
        self.apply(initialise)

    @property
    def longest_history(self) -> int:
        """See `findrec.models.capabilities.LimitedHistory`: the number of learned positions."""
        return self.position.num_embeddings

    def encode(self, x_BLd: Tensor, batch: Batch) -> Tensor:
        """See `HistoryModel`; raises `FindRecError` for a history longer than `longest_history`."""
        x_BLd = self.inputs.drop(x_BLd + self.position(x_BLd.shape[1]))
        for block in self.blocks:
            x_BLd = self.run_layer(block, x_BLd)
        return x_BLd
