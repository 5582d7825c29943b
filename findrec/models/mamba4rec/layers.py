"""The layers of Mamba4Rec: post-normalised Mamba blocks and position-wise networks.

Shape letters: B rows, L steps, d width; `...d` is `[B, L, d]` or, for one event of each row, `[B, d]`.
"""

from __future__ import annotations

from torch import Tensor, nn
from torch.nn import functional as F

from findrec.models.parts.activation_checkpointing import CheckpointedModule
from findrec.models.parts.layers import Dropout
from findrec.models.parts.mamba import Mamba, MambaState
from findrec.models.parts.stream_config import StreamConfig

FEED_FACTOR = 4  # width of the position-wise networks, as a multiple of d
INIT_STD = 0.02
NORM_EPS = 1e-12  # as in the public code


class PostNormLayer(nn.Module):
    """`y = LN(x + Mamba(x))`, or `LN(Mamba(x))` without a residual, then `LN(y + feed(y))`."""

    def __init__(self, dim: int, dropout: float, config: StreamConfig, *, residual: bool) -> None:
        super().__init__()
        self.residual = residual
        self.mamba = Mamba(dim, config)
        self.norm_mamba = nn.LayerNorm(dim, eps=NORM_EPS)
        self.feed_in = nn.Linear(dim, FEED_FACTOR * dim)
        self.feed_out = nn.Linear(FEED_FACTOR * dim, dim)
        self.norm_feed = nn.LayerNorm(dim, eps=NORM_EPS)
        self.dropout = Dropout(dropout)
        # Not of the block: its time steps and decay rates have an initialisation of their own.
        for linear in (self.feed_in, self.feed_out):
            nn.init.normal_(linear.weight, std=INIT_STD)
            nn.init.zeros_(linear.bias)

    def forward(self, x_BLd: Tensor) -> Tensor:
        """`[B, L, d]` to `[B, L, d]`, causal."""
        return self.finish(x_BLd, self.mamba(x_BLd))

    def finish(self, x: Tensor, mixed: Tensor) -> Tensor:
        """The output `[..., d]` of the layer for its input and the output of its block."""
        mixed = self.dropout(mixed)
        y: Tensor = self.norm_mamba(x + mixed if self.residual else mixed)
        fed = self.feed_out(self.dropout(F.gelu(self.feed_in(y))))
        normed: Tensor = self.norm_feed(y + self.dropout(fed))
        return normed


class Mamba4RecLayers(CheckpointedModule):
    """A LayerNorm of the inputs, and the layers; a single layer has no residual around its block.

    A `RecurrentStream` (`findrec.models.parts.streaming`), whose state is that of each block.
    """

    def __init__(self, dim: int, dropout: float, config: StreamConfig) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(dim, eps=NORM_EPS)
        self.layers = nn.ModuleList(
            [PostNormLayer(dim, dropout, config, residual=config.layers > 1) for _ in range(config.layers)]
        )

    def forward(self, x_BLd: Tensor) -> Tensor:
        """`[B, L, d]` to `[B, L, d]`, causal."""
        x_BLd = self.norm(x_BLd)
        for layer in self.layers:
            x_BLd = self.run_layer(layer, x_BLd)
        return x_BLd

    def initial_state(self, batch_size: int) -> list[MambaState]:
        """The states of rows without events."""
        return [self._layer(i).mamba.initial_state(batch_size) for i in range(len(self.layers))]

    def prefill(
        self, x_BLd: Tensor, length_B: Tensor, states: list[MambaState] | None = None
    ) -> tuple[Tensor, list[MambaState]]:
        """See `RecurrentStream`; in evaluation mode, as states are those without dropout."""
        x_BLd, new_states = self.norm(x_BLd), []
        for i in range(len(self.layers)):
            layer = self._layer(i)
            mixed_BLd, state = layer.mamba.prefill(x_BLd, length_B, None if states is None else states[i])
            x_BLd = layer.finish(x_BLd, mixed_BLd)
            new_states.append(state)
        return x_BLd, new_states

    def step(self, x_Bd: Tensor, states: list[MambaState]) -> tuple[Tensor, list[MambaState]]:
        """See `RecurrentStream`; in evaluation mode, as states are those without dropout."""
        x_Bd, new_states = self.norm(x_Bd), []
        for i, state in enumerate(states):
            layer = self._layer(i)
            mixed_Bd, state = layer.mamba.step(x_Bd, state)
            x_Bd = layer.finish(x_Bd, mixed_Bd)
            new_states.append(state)
        return x_Bd, new_states

    def _layer(self, i: int) -> PostNormLayer:
        layer = self.layers[i]
        assert isinstance(layer, PostNormLayer)
        return layer
