"""The LiGR layer: pre-normalised attention and SwiGLU with gated residual branches.

"From Features to Transformers: Redefining Ranking for Scalable Impact" (arXiv 2502.03417). Shape letters:
B rows, L steps, d width.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from findrec.models.parts.layers import Dropout
from findrec.models.parts.transformer import causal_attention


class GatedLayer(nn.Module):
    """`x + sigmoid(W x) * attention(LN x)`, then `x + sigmoid(W' x) * SwiGLU(LN x)`; causal."""

    def __init__(self, dim: int, heads: int, feed_factor: int, dropout: float) -> None:
        super().__init__()
        self.heads = heads
        self.norm_attention = nn.LayerNorm(dim)
        self.qkv = nn.Linear(dim, 3 * dim)
        self.out = nn.Linear(dim, dim)
        self.gate_attention = nn.Linear(dim, dim)
        self.norm_feed = nn.LayerNorm(dim)
        self.feed_in = nn.Linear(dim, 2 * feed_factor * dim)  # of the SiLU branch, and of what it multiplies
        self.feed_out = nn.Linear(feed_factor * dim, dim)
        self.gate_feed = nn.Linear(dim, dim)
        self.dropout = Dropout(dropout)

    def forward(self, x_BLd: Tensor) -> Tensor:
        """`[B, L, d]` to `[B, L, d]`."""
        mixed_BLd = self.out(causal_attention(self.qkv(self.norm_attention(x_BLd)), self.heads))
        x_BLd = torch.addcmul(x_BLd, torch.sigmoid(self.gate_attention(x_BLd)), self.dropout(mixed_BLd))
        switch, value = self.feed_in(self.norm_feed(x_BLd)).chunk(2, dim=-1)
        fed_BLd = self.feed_out(self.dropout(F.silu(switch) * value))
        return torch.addcmul(x_BLd, torch.sigmoid(self.gate_feed(x_BLd)), self.dropout(fed_BLd))
