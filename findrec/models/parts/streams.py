"""The ID stream of FindRec: Mamba, or a GRU or Transformer as ablations.

All of them map `[B, L, d]` to `[B, L, d]` and are causal. Shape letters: B rows, L steps, d width.
"""

from __future__ import annotations

from torch import Tensor, nn

from findrec.models.parts.activation_checkpointing import CheckpointedModule
from findrec.models.parts.layers import ResidualStream
from findrec.models.parts.mamba import MambaStream
from findrec.models.parts.stream_config import StreamConfig
from findrec.models.parts.transformer import Block, LearnedPositions, check_heads, initialise


def build_stream(dim: int, dropout: float, config: StreamConfig, max_length: int) -> nn.Module:
    """The stream selected by `config.kind`; `max_length` is the number of positions a Transformer learns.

    Raises `FindRecError` if the heads of the Transformer do not divide the width.
    """
    if config.kind == "mamba":
        return MambaStream(dim, dropout, config)
    if config.kind == "gru":
        return GRUStream(dim, dropout, config.layers)
    return TransformerStream(dim, dropout, config, max_length)


class GRUStream(ResidualStream):
    """Residual layers of GRUs."""

    def __init__(self, dim: int, dropout: float, layers: int) -> None:
        super().__init__(dim, dropout, [nn.GRU(dim, dim, batch_first=True) for _ in range(layers)])


class TransformerStream(CheckpointedModule):
    """Learned position embeddings and causal Transformer blocks."""

    def __init__(self, dim: int, dropout: float, config: StreamConfig, max_length: int) -> None:
        super().__init__()
        check_heads(dim, config.heads, "heads")
        self.position = LearnedPositions(max_length, dim)
        self.blocks = nn.ModuleList([Block(dim, config.heads, dropout) for _ in range(config.layers)])
        self.apply(initialise)

    def forward(self, x_BLd: Tensor) -> Tensor:
        """`[B, L, d]` to `[B, L, d]`; raises `FindRecError` for more steps than learned positions."""
        x_BLd = x_BLd + self.position(x_BLd.shape[1])
        for block in self.blocks:
            x_BLd = self.run_layer(block, x_BLd)
        return x_BLd
