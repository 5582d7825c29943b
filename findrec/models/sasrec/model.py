"""SASRec, the reference baseline (Kang & McAuley 2018, arXiv 1808.09781).

A causal Transformer over item ids in its modern form: pre-normalised blocks, GELU, no dropout on attention
weights, and the loss, width and budget of the other models.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from findrec.datasets.batches.batch import Batch
from findrec.datasets.folder.features import ModalRows
from findrec.errors import FindRecError
from findrec.models.base import DataFacts, Out, SequenceModel
from findrec.models.parts.layers import Inputs, WaitTimeModulation, gather_positions
from findrec.models.parts.repeat import RepeatHead
from findrec.models.parts.transformer import Block, initialise
from findrec.models.sasrec.config import SASRecConfig


class SASRec(SequenceModel):
    """A causal Transformer over item ids; modalities are ignored."""

    Config = SASRecConfig

    def __init__(self, config: SASRecConfig, facts: DataFacts) -> None:
        """Raises `FindRecError` if the heads do not divide the width."""
        super().__init__()
        if config.dim % config.heads:
            raise FindRecError(
                f"model.dim={config.dim} is not a multiple of model.heads={config.heads}: each attention "
                "head takes an equal part of the width; change one of them"
            )
        self.config = config
        self.max_length = facts.max_length
        self.inputs = Inputs(
            config.dim, config.dropout, gaps=config.gaps, num_event_types=facts.num_event_types
        )
        self.position = nn.Embedding(facts.max_length, config.dim)
        self.blocks = nn.ModuleList(
            [Block(config.dim, config.heads, config.dropout) for _ in range(config.layers)]
        )
        self.norm = nn.LayerNorm(config.dim)
        self.apply(initialise)
        # Created after `apply`, as both are initialised to zero. `moment` is part of the checkpoint format.
        self.moment = WaitTimeModulation(config.dim) if config.wait else None
        self.repeat_head = RepeatHead(config.dim) if config.repeat else None

    @property
    def longest_history(self) -> int:
        """See `findrec.models.capabilities.LimitedHistory`: the number of learned positions."""
        return self.max_length

    def forward(self, batch: Batch, x_items: Tensor, features: Mapping[str, ModalRows]) -> Out:
        """See `SequenceModel`; raises `FindRecError` for a history longer than `max_length`."""
        length = batch.item.shape[1]
        if length > self.max_length:
            raise FindRecError(
                f"a history of {length} events was given to a SASRec with {self.max_length} learned "
                "positions; cut histories to the last data.max_length events (its value in training)"
            )
        position_Ld = self.position(torch.arange(length, device=x_items.device))
        x_BLd = self.inputs.drop(self.inputs(batch, x_items) + position_Ld)
        for block in self.blocks:
            x_BLd = self.run_layer(block, x_BLd)
        h_Td = gather_positions(x_BLd, batch)
        if self.moment is not None:
            h_Td = self.moment(h_Td, batch)
        h_Td = self.norm(h_Td)
        return Out(h_Td, None if self.repeat_head is None else self.repeat_head(h_Td))
