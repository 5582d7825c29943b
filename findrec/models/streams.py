"""The ID stream of FindRec: Mamba, or what its ablations put in its place.

All map `[B, L, d]` to `[B, L, d]`, causally. Shape letters: B rows, L steps, d width.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from findrec.config import StreamConfig
from findrec.errors import FindRecError
from findrec.models.layers import Dropout, LayerScale
from findrec.models.mamba import MambaStream
from findrec.models.recompute import Recomputing
from findrec.models.transformer import Block, initialise


def build_stream(dim: int, dropout: float, config: StreamConfig, max_length: int) -> nn.Module:
    """The stream `config.kind` names; `max_length` limits the Transformer alone, which learns positions.

    Raises `FindRecError` when the heads of the Transformer do not divide the width.
    """
    if config.kind == "mamba":
        return MambaStream(dim, dropout, config)
    if config.kind == "gru":
        return GRUStream(dim, dropout, config.layers)
    return TransformerStream(dim, dropout, config, max_length)


class GRUStream(Recomputing):
    """Layers of [LayerNorm, GRU, dropout, LayerScale], each added to its input, as the Mamba stream's are."""

    def __init__(self, dim: int, dropout: float, layers: int) -> None:
        super().__init__()
        self.norms = nn.ModuleList([nn.LayerNorm(dim) for _ in range(layers)])
        self.blocks = nn.ModuleList([nn.GRU(dim, dim, batch_first=True) for _ in range(layers)])
        self.scales = nn.ModuleList([LayerScale(dim) for _ in range(layers)])
        self.dropout = Dropout(dropout)

    def forward(self, x_BLd: Tensor) -> Tensor:
        """`[B, L, d]` to `[B, L, d]`, causal."""
        for parts in zip(self.norms, self.blocks, self.scales, strict=True):
            x_BLd = self.run_layer(self._layer, x_BLd, *parts)
        return x_BLd

    def _layer(self, x_BLd: Tensor, norm: nn.Module, block: nn.Module, scale: nn.Module) -> Tensor:
        mixed_BLd, _ = block(norm(x_BLd))
        added_BLd: Tensor = x_BLd + scale(self.dropout(mixed_BLd))
        return added_BLd


class TransformerStream(Recomputing):
    """Learned positions, then causal Transformer blocks."""

    def __init__(self, dim: int, dropout: float, config: StreamConfig, max_length: int) -> None:
        super().__init__()
        if dim % config.heads:
            raise FindRecError(
                f"model.dim={dim} is no multiple of model.stream.heads={config.heads}: each attention head "
                "takes an equal part of the width; change one of them"
            )
        self.position = nn.Embedding(max_length, dim)
        self.blocks = nn.ModuleList([Block(dim, config.heads, dropout) for _ in range(config.layers)])
        self.apply(initialise)

    def forward(self, x_BLd: Tensor) -> Tensor:
        """`[B, L, d]` to `[B, L, d]`, causal; raises `FindRecError` for more steps than learned positions."""
        length = x_BLd.shape[1]
        if length > self.position.num_embeddings:
            raise FindRecError(
                f"a history of {length} events was given to a Transformer with "
                f"{self.position.num_embeddings} learned positions; cut histories to the last "
                "data.max_length events, the value it was trained with"
            )
        x_BLd = x_BLd + self.position(torch.arange(length, device=x_BLd.device))
        for block in self.blocks:
            x_BLd = self.run_layer(block, x_BLd)
        return x_BLd
