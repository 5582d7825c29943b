"""SASRec, the reference every other model is compared with (Kang & McAuley 2018, arXiv 1808.09781).

A causal Transformer over item ids, in its present form: pre-normalised blocks, GELU, and the loss, width and
budget of the other models. Attention weights get no dropout: that keeps the fused kernel and its O(L) memory.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from findrec.config import ModelConfig
from findrec.datasets.batch import Batch, ModalRows
from findrec.errors import FindRecError
from findrec.models.base import Out, SequenceModel
from findrec.models.layers import Inputs, Moment, asked_rows
from findrec.models.repeat import RepeatHead
from findrec.models.transformer import Block, initialise


class SASRec(SequenceModel):
    """Item ids only; modalities are ignored."""

    def __init__(
        self,
        config: ModelConfig,
        *,
        feature_dims: Mapping[str, int],
        repeat: bool,
        max_length: int,
        num_event_types: int = 0,
    ) -> None:
        """Raises `FindRecError` when the heads do not divide the width. `feature_dims` is not used."""
        super().__init__()
        if config.dim % config.heads:
            raise FindRecError(
                f"model.dim={config.dim} is no multiple of model.heads={config.heads}: each attention head "
                "takes an equal part of the width; change one of them"
            )
        self.max_length = max_length
        self.inputs = Inputs(config.dim, config.dropout, gaps=config.gaps, num_event_types=num_event_types)
        self.position = nn.Embedding(max_length, config.dim)
        self.blocks = nn.ModuleList(
            [Block(config.dim, config.heads, config.dropout) for _ in range(config.layers)]
        )
        self.norm = nn.LayerNorm(config.dim)
        self.apply(initialise)
        # After the initialisation above: both start from zero.
        self.moment = Moment(config.dim) if config.wait else None
        self.repeat_head = RepeatHead(config.dim) if repeat else None

    def forward(self, batch: Batch, x_items: Tensor, features: Mapping[str, ModalRows]) -> Out:
        """See `SequenceModel`. Raises `FindRecError` for a history longer than `max_length`."""
        length = batch.item.shape[1]
        if length > self.max_length:
            raise FindRecError(
                f"a history of {length} events was given to a SASRec with {self.max_length} learned "
                "positions; cut histories to the last data.max_length events, the value it was trained with"
            )
        place_Ld = self.position(torch.arange(length, device=x_items.device))
        x_BLd = self.inputs.drop(self.inputs(batch, x_items) + place_Ld)
        for block in self.blocks:
            x_BLd = self.run_layer(block, x_BLd)
        h_Td = asked_rows(x_BLd, batch)
        if self.moment is not None:
            h_Td = self.moment(h_Td, batch)
        h_Td = self.norm(h_Td)
        return Out(h_Td, None if self.repeat_head is None else self.repeat_head(h_Td))
