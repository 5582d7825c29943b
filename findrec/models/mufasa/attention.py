"""A layer of the sequence model: sparse self-attention and a position-wise network.

    o_t = sum over c in branches  g_t^c  Attn(q_t, K^c, V^c),   g_t = sigmoid(MLP(x_t)) for each head

with keys and values of each branch (arXiv 2502.11089, equation 5). Compressed keys and values are a network
over the concatenated steps of a block, to which learned embeddings of the place in the block are added.
Queries and keys of the window and of selected blocks have rotary positions; compressed ones have none.

Shape letters: B rows, L steps, P positions, H heads, G groups, N compressed blocks, l steps of a block, h
width of a head, d width.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from findrec.models.mufasa.rotary import rotate
from findrec.models.parts.layers import Dropout
from findrec.ops.sparse_attention.attention import (
    Branch,
    Branches,
    cut_blocks,
    leader_positions,
    sparse_attention,
)
from findrec.ops.sparse_attention.sizes import SparseSizes

GATE_HIDDEN = 16


class Compression(nn.Module):
    """phi: one vector for each block of l steps."""

    def __init__(self, length: int, width: int) -> None:
        super().__init__()
        self.place = nn.Parameter(0.02 * torch.randn(length, width))
        self.hidden = nn.Linear(length * width, 2 * width)
        self.out = nn.Linear(2 * width, width, bias=False)  # a constant in all keys would change nothing

    def forward(self, block_BNlGh: Tensor) -> Tensor:
        """`[B, N, G, h]`."""
        placed = block_BNlGh.transpose(2, 3) + self.place
        vector: Tensor = self.out(F.gelu(self.hidden(placed.flatten(3))))
        return vector


class SparseSelfAttention(nn.Module):
    """Attention by the given branches, causal, from the beginning of each row."""

    def __init__(
        self, dim: int, heads: int, groups: int, sizes: SparseSizes, branches: Sequence[str]
    ) -> None:
        super().__init__()
        self.heads, self.groups, self.width, self.sizes = heads, groups, dim // heads, sizes
        self.branches = tuple(branches)
        self.query = nn.Linear(dim, dim, bias=False)
        self.read = nn.Linear(dim, 2 * len(branches) * groups * self.width, bias=False)
        self.gate_hidden = nn.Linear(dim, GATE_HIDDEN)
        self.gate_out = nn.Linear(GATE_HIDDEN, heads * len(branches))
        self.out = nn.Linear(dim, dim)
        self.compress_k = self.compress_v = None
        if "block" in branches:
            self.compress_k = Compression(sizes.block, self.width)
            self.compress_v = Compression(sizes.block, self.width)

    def forward(self, x_BLd: Tensor, position_BP: Tensor | None = None) -> Tensor:
        """`[B, L, d]`, or `[B, P, d]` at the positions."""
        length = x_BLd.shape[1]
        # At least one block, so that all weights have a gradient in every batch.
        x_BLd = F.pad(x_BLd, (0, 0, 0, max(0, self.sizes.block - length)))
        steps = torch.arange(x_BLd.shape[1], device=x_BLd.device)
        own_BPd, at, leader_q = x_BLd, steps, None
        if position_BP is not None:
            row = torch.arange(len(x_BLd), device=x_BLd.device)[:, None]
            own_BPd, at = x_BLd[row, position_BP], position_BP
            leader_q = self._queries(x_BLd[row, leader_positions(position_BP, self.sizes)])
        q, gate = self._queries(own_BPd), self._gates(own_BPd)
        branches = self._branches(q, rotate(q, at), self._keys_and_values(x_BLd), gate, steps)
        mixed = sparse_attention(branches, self.sizes, position_BP=position_BP, leader_q=leader_q)
        result: Tensor = self.out(mixed.flatten(2))
        return result[:, :length] if position_BP is None else result

    def _queries(self, x_BPd: Tensor) -> Tensor:
        q: Tensor = self.query(x_BPd).unflatten(2, (self.heads, self.width))
        return q

    def _gates(self, x_BPd: Tensor) -> dict[str, Tensor]:
        gates = torch.sigmoid(self.gate_out(F.silu(self.gate_hidden(x_BPd))))
        return dict(zip(self.branches, gates.chunk(len(self.branches), dim=2), strict=True))

    def _keys_and_values(self, x_BLd: Tensor) -> dict[str, tuple[Tensor, Tensor]]:
        parts = self.read(x_BLd).unflatten(2, (2 * len(self.branches), self.groups, self.width)).unbind(2)
        return {name: (parts[2 * i], parts[2 * i + 1]) for i, name in enumerate(self.branches)}

    def _branches(
        self,
        q: Tensor,
        rotated_q: Tensor,
        read: dict[str, tuple[Tensor, Tensor]],
        gate: dict[str, Tensor],
        steps: Tensor,
    ) -> Branches:
        given: dict[str, Branch] = {}
        for name in ("window", "selected"):
            if name in read:
                k, v = read[name]
                given[name] = Branch(rotated_q, rotate(k, steps), v, gate[name])
        if self.compress_k is not None and self.compress_v is not None:
            k, v = (cut_blocks(x, self.sizes) for x in read["block"])
            given["block"] = Branch(q, self.compress_k(k), self.compress_v(v), gate["block"])
        elif "selected" in read:  # without the block branch, blocks are scored by the means of their keys
            k = cut_blocks(read["selected"][0], self.sizes).mean(2)
            given["block"] = Branch(q, k, k, None)
        return Branches(**given)


class SparseLayer(nn.Module):
    """Attention and a SwiGLU network (Shazeer 2020), each a residual branch normalised by RMSNorm."""

    def __init__(
        self, dim: int, heads: int, groups: int, sizes: SparseSizes, branches: Sequence[str], dropout: float
    ) -> None:
        super().__init__()
        self.norm_attention = nn.RMSNorm(dim, eps=1e-6)
        self.attention = SparseSelfAttention(dim, heads, groups, sizes, branches)
        self.norm_feed = nn.RMSNorm(dim, eps=1e-6)
        self.feed_in = nn.Linear(dim, 4 * dim)  # gates and values of 2 d hidden units
        self.feed_out = nn.Linear(2 * dim, dim)
        self.dropout = Dropout(dropout)

    def forward(self, x_BLd: Tensor, position_BP: Tensor | None = None) -> Tensor:
        """`[B, L, d]`, or `[B, P, d]` at the positions."""
        mixed = self.attention(self.norm_attention(x_BLd), position_BP)
        if position_BP is not None:
            x_BLd = x_BLd[torch.arange(len(x_BLd), device=x_BLd.device)[:, None], position_BP]
        x_BLd = x_BLd + self.dropout(mixed)
        gate, value = self.feed_in(self.norm_feed(x_BLd)).chunk(2, dim=2)
        fed_BLd: Tensor = x_BLd + self.dropout(self.feed_out(F.silu(gate) * value))
        return fed_BLd
