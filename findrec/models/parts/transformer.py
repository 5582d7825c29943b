"""The pre-normalised Transformer block and its initialisation (Vaswani et al. 2017; Xiong et al. 2020).

There is no dropout on attention weights, so that the fused kernel with O(L) memory can be used.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from findrec.errors import FindRecError
from findrec.models.parts.layers import Dropout

INIT_STD = 0.02


def check_heads(dim: int, heads: int, key: str) -> None:
    """Raise `FindRecError` if `heads`, the value of the key `key`, do not divide the width."""
    if dim % heads:
        raise FindRecError(
            f"model.dim={dim} is not a multiple of {key}={heads}: each attention head takes an equal part of "
            "the width; change one of them"
        )


class LearnedPositions(nn.Embedding):
    """A learned vector for each position of a history, from the oldest event on."""

    def forward(self, length: int) -> Tensor:  # type: ignore[override]
        """The vectors `[L, d]`; raises `FindRecError` for more positions than there are."""
        if length > self.num_embeddings:
            raise FindRecError(
                f"a history of {length} events was given to a model with {self.num_embeddings} learned "
                "positions; cut histories to the last data.max_length events (its value in training)"
            )
        return super().forward(torch.arange(length, device=self.weight.device))


def causal_attention(qkv_BLe: Tensor, heads: int) -> Tensor:
    """Softmax attention `[B, L, d]` of each event to itself and the events before it.

    `qkv_BLe` `[B, L, 3 d]` are queries, keys and values of all heads. Uses the fused kernel, whose memory is
    linear in the length.
    """
    b, length, width = qkv_BLe.shape
    qkv = qkv_BLe.view(b, length, 3, heads, width // (3 * heads))
    q, k, v = qkv.permute(2, 0, 3, 1, 4).unbind(0)
    mixed = F.scaled_dot_product_attention(q, k, v, is_causal=True)
    return mixed.transpose(1, 2).reshape(b, length, width // 3)


class Block(nn.Module):
    """Causal self-attention and a position-wise network, each a pre-normalised residual branch."""

    def __init__(self, dim: int, heads: int, dropout: float) -> None:
        super().__init__()
        self.heads = heads
        self.norm_attention = nn.LayerNorm(dim)
        self.qkv = nn.Linear(dim, 3 * dim)
        self.out = nn.Linear(dim, dim)
        self.norm_feed = nn.LayerNorm(dim)
        self.feed_in = nn.Linear(dim, 4 * dim)
        self.feed_out = nn.Linear(4 * dim, dim)
        self.dropout = Dropout(dropout)

    def forward(self, x_BLd: Tensor) -> Tensor:
        """`[B, L, d]` to `[B, L, d]`."""
        mixed_BLd = causal_attention(self.qkv(self.norm_attention(x_BLd)), self.heads)
        x_BLd = x_BLd + self.dropout(self.out(mixed_BLd))
        fed = self.feed_out(F.gelu(self.feed_in(self.norm_feed(x_BLd))))
        fed_BLd: Tensor = x_BLd + self.dropout(fed)
        return fed_BLd


@torch.no_grad()
def initialise(module: nn.Module) -> None:
    """Xavier initialisation of linear layers, small normal position embeddings."""
    if isinstance(module, nn.Linear):
        nn.init.xavier_uniform_(module.weight)
        nn.init.zeros_(module.bias)
    elif isinstance(module, nn.Embedding):
        nn.init.normal_(module.weight, std=INIT_STD)
