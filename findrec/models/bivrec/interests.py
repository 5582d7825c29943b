"""Several interests at every position of a history, from the events up to it.

Shape letters: B users, L steps, K interests, H heads, d width.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from findrec.devices import copy_to
from findrec.models.bivrec.config import BiVRecConfig, InterestsConfig
from findrec.models.parts.activation_checkpointing import CheckpointedModule
from findrec.models.parts.layers import Dropout
from findrec.models.parts.transformer import INIT_STD, LearnedPositions, initialise

EMPTY = 0.01  # weight of no event at all: an interest without events is its token
SPAN = 4.0  # events until the weight of an event has fallen to 1 / e, at first


class Patches(nn.Module):
    """Adds to each event the patches that end with it: `x_l + sum_p U_p mean(x_{l-p+1..l})`."""

    def __init__(self, dim: int, scales: Sequence[int]) -> None:
        super().__init__()
        self.scales = tuple(scales)
        self.maps = nn.ModuleList([nn.Linear(dim, dim, bias=False) for _ in scales])
        for parameter in self.maps.parameters():  # at first patches change little
            nn.init.normal_(parameter, std=INIT_STD)

    def forward(self, x_BLd: Tensor) -> Tensor:
        """`[B, L, d]` to `[B, L, d]`, causal; a patch that begins before the first event is shorter."""
        length = x_BLd.shape[1]
        total_BLd = x_BLd
        for scale, linear in zip(self.scales, self.maps, strict=True):
            # Sums of a few events: differences of running sums would lose digits in long histories.
            padded = F.pad(x_BLd, (0, 0, scale - 1, 0))
            patch_BLd = padded.unfold(1, scale, 1).sum(-1)
            events_L = torch.arange(1, length + 1, device=x_BLd.device).clamp(max=scale)
            total_BLd = total_BLd + linear(patch_BLd / events_L[:, None])
        return total_BLd


class GaussianBlock(nn.Module):
    """A causal pre-normalised Transformer block whose attention falls with the distance of events.

    The logits of head h get `-(l - j)^2 / (2 s_h^2)` with learned widths s, at first 4, 8, 16, ... events.
    """

    def __init__(self, dim: int, heads: int, dropout: float, *, gaussian: bool) -> None:
        super().__init__()
        self.heads = heads
        self.norm_attention, self.norm_feed = nn.LayerNorm(dim), nn.LayerNorm(dim)
        self.qkv, self.out = nn.Linear(dim, 3 * dim), nn.Linear(dim, dim)
        self.feed_in, self.feed_out = nn.Linear(dim, 4 * dim), nn.Linear(4 * dim, dim)
        self.dropout = Dropout(dropout)
        self.log_width = None
        if gaussian:
            self.log_width = nn.Parameter(math.log(2) * torch.arange(2.0, heads + 2))

    def forward(self, x_BLd: Tensor) -> Tensor:
        """`[B, L, d]` to `[B, L, d]`."""
        b, length, dim = x_BLd.shape
        qkv = self.qkv(self.norm_attention(x_BLd)).view(b, length, 3, self.heads, dim // self.heads)
        q, k, v = qkv.permute(2, 0, 3, 1, 4).unbind(0)
        if self.log_width is None:
            mixed = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        else:
            mixed = F.scaled_dot_product_attention(q, k, v, attn_mask=self._bias(length).to(q.dtype))
        x_BLd = x_BLd + self.dropout(self.out(mixed.transpose(1, 2).reshape(b, length, dim)))
        fed = self.feed_out(F.gelu(self.feed_in(self.norm_feed(x_BLd))))
        sum_BLd: Tensor = x_BLd + self.dropout(fed)
        return sum_BLd

    def _bias(self, length: int) -> Tensor:
        """`[H, L, L]`, -inf for later events."""
        assert self.log_width is not None
        step_L = torch.arange(length, device=self.log_width.device)
        distance_LL = step_L[:, None] - step_L
        bias_HLL = -(distance_LL.square() / 2) * torch.exp(-2 * self.log_width)[:, None, None]
        return bias_HLL.masked_fill(distance_LL < 0, -torch.inf)


class ClusterAttention(nn.Module):
    """Allocates events to interests, each of which is a mean of its events so far, recent ones first.

        a_jk = softmax_k (q_k . W_k LN(x_j)),   b_ljk = a_jk exp(-(l - j) / s_k) for j <= l
        m_lk = sum_j b_ljk W_v LN(x_j) / (EMPTY + sum_j b_ljk)
        u_lk = LN(z_lk + network(LN(z_lk))),    z_lk = q_k + W_o m_lk

    Interests know of the history only by the events that they are allocated. They compete for events, where
    ordinary attention lets events compete for a query. An allocation depends on the event alone, so that of
    earlier events stays as it is while the history grows.
    """

    def __init__(self, dim: int, config: InterestsConfig) -> None:
        super().__init__()
        self.config = config
        self.tokens = nn.Parameter(torch.empty(config.number, dim))
        nn.init.orthogonal_(self.tokens)
        self.log_span = nn.Parameter(torch.full((config.number,), math.log(SPAN)))
        self.norm, self.norm_feed, self.norm_out = (nn.LayerNorm(dim) for _ in range(3))
        self.value, self.out = nn.Linear(dim, dim), nn.Linear(dim, dim)
        self.key = nn.Linear(dim, dim) if config.number > 1 else None  # a single interest has all events
        self.feed_in, self.feed_out = nn.Linear(dim, 2 * dim), nn.Linear(2 * dim, dim)

    def forward(self, x_BLd: Tensor) -> tuple[Tensor, Tensor]:
        """Interests `[B, L, K, d]`, and the logits of the allocation of events `[B, L, K]`."""
        normed_BLd = self.norm(x_BLd)
        logit_BLK = normed_BLd.new_zeros(*normed_BLd.shape[:2], 1)
        if self.key is not None:
            logit_BLK = self.key(normed_BLd) @ self.tokens.t()
        share_BLK = self._shares(logit_BLK)
        decay_KLL = self._decay(x_BLd.shape[1]).to(share_BLK.dtype)
        value_BLKd = share_BLK[..., None] * self.value(normed_BLd)[:, :, None]
        sum_BLKd = torch.einsum("klj,bjkd->blkd", decay_KLL, value_BLKd)
        weight_BLK = torch.einsum("klj,bjk->blk", decay_KLL, share_BLK)
        z_BLKd = self.tokens + self.out(sum_BLKd / (EMPTY + weight_BLK[..., None]))
        fed_BLKd = self.feed_out(F.gelu(self.feed_in(self.norm_feed(z_BLKd))))
        interest_BLKd: Tensor = self.norm_out(z_BLKd + fed_BLKd)
        return interest_BLKd, logit_BLK

    def _decay(self, length: int) -> Tensor:
        """`[K, L, L]`: the weight of each event at each position, 0 for later events."""
        step_L = torch.arange(length, device=self.log_span.device)
        distance_LL = step_L[:, None] - step_L
        decay_KLL = torch.exp(-distance_LL.clamp(min=0) * torch.exp(-self.log_span)[:, None, None])
        return decay_KLL * (distance_LL >= 0)

    def _shares(self, logit_BLK: Tensor) -> Tensor:
        """The share of each event that each interest has, with Gumbel noise in training."""
        if self.training and self.config.noise:
            uniform = torch.rand(logit_BLK.shape).clamp(1e-6, 1 - 1e-6)
            gumbel = -torch.log(-torch.log(uniform))
            logit_BLK = logit_BLK + self.config.noise * copy_to(gumbel, logit_BLK.device)
        share_BLK = logit_BLK.softmax(-1)
        if self.config.assignment == "hard":
            one_BLK = F.one_hot(share_BLK.argmax(-1), share_BLK.shape[-1]).to(share_BLK.dtype)
            share_BLK = one_BLK - share_BLK.detach() + share_BLK
        return share_BLK


class View(CheckpointedModule):
    """The interests of one view of the history: of ids, or of content."""

    def __init__(self, config: BiVRecConfig, max_length: int) -> None:
        super().__init__()
        self.patches = Patches(config.dim, config.scales)
        self.position = LearnedPositions(max_length, config.dim)
        self.dropout = Dropout(config.dropout)
        self.blocks = nn.ModuleList(
            [
                GaussianBlock(config.dim, config.heads, config.dropout, gaussian=config.gaussian)
                for _ in range(config.layers)
            ]
        )
        self.cluster = ClusterAttention(config.dim, config.interests)
        for module in (self.position, self.blocks, self.cluster):
            module.apply(initialise)

    def forward(self, x_BLd: Tensor) -> tuple[Tensor, Tensor]:
        """Interests `[B, L, K, d]` and allocation logits `[B, L, K]` of inputs `[B, L, d]`."""
        position_Ld = self.position(x_BLd.shape[1])
        x_BLd = self.dropout(self.patches(x_BLd) + position_Ld)
        for block in self.blocks:
            x_BLd = self.run_layer(block, x_BLd)
        interests, logits = self.run_layer(self.cluster, x_BLd)
        return interests, logits
