"""The HSTU layer: gated pointwise attention with relative biases (Zhai et al. 2024, arXiv 2402.17152).

Shape letters: B rows, L steps, H heads, d width, c width of a head.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from findrec.devices import is_cpu
from findrec.models.parts.layers import Dropout
from findrec.models.parts.transformer import INIT_STD

LOG_BASE = 0.301  # natural logarithm of the ratio of the bounds of a time bucket, as in the public code
NUM_TIME_BUCKETS = 129
NORM_EPS = 1e-6


@dataclass(frozen=True)
class Relations:
    """How each event l (dimension 1) relates to the events j (dimension 2) that it can attend to."""

    distance_LL: Tensor  # int64, l - j, 0 where j is later
    time_BLL: Tensor | None  # int64, bucket of the time between them

    @staticmethod
    def of(length: int, device: torch.device, key_BL: Tensor | None, query_BL: Tensor | None) -> Relations:
        """The relations of `length` steps, with times of the attended events and of those that attend (s)."""
        step_L = torch.arange(length, device=device)
        distance_LL = (step_L[:, None] - step_L).clamp(min=0)
        if key_BL is None or query_BL is None:
            return Relations(distance_LL, None)
        return Relations(distance_LL, time_buckets(query_BL[:, :, None] - key_BL[:, None]))


def time_buckets(seconds: Tensor) -> Tensor:
    """`floor(ln(max(1, seconds)) / 0.301)`, at most 128."""
    bucket = (seconds.clamp(min=1).float().log() / LOG_BASE).long()
    return bucket.clamp(max=NUM_TIME_BUCKETS - 1)


class _Lookup(torch.autograd.Function):
    """`table[index]` of numbers on a CPU, where an embedding of width 1 takes several times as long."""

    @staticmethod
    def forward(ctx: Any, table_n: Tensor, index: Tensor) -> Tensor:
        ctx.save_for_backward(index)
        ctx.num_entries = len(table_n)
        return table_n.take(index)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        (index,) = ctx.saved_tensors
        sums_n = torch.bincount(index.flatten(), grads[0].flatten(), minlength=ctx.num_entries)
        return sums_n.to(grads[0].dtype), None


def look_up(table: nn.Embedding, index: Tensor) -> Tensor:
    """The numbers of a table of width 1, in the shape of `index`."""
    if not is_cpu(index.device):
        return F.embedding(index, table.weight).squeeze(-1)
    found: Tensor = _Lookup.apply(table.weight.flatten(), index)  # type: ignore[no-untyped-call]
    return found


class HSTULayer(nn.Module):
    """`x + W2 (LN(A V) * U)` with `U, V, Q, K = SiLU(W1 LN(x))` and `A = SiLU(Q K^T + bias) / n`, causal.

    `n` is the longest history. It is a constant, so results do not depend on padding.
    """

    uses_child_weights = True  # `look_up` reads the tables of biases

    def __init__(self, dim: int, heads: int, max_length: int, dropout: float, *, times: bool) -> None:
        super().__init__()
        self.heads, self.max_length = heads, max_length
        self.uvqk = nn.Linear(dim, 4 * dim, bias=False)
        self.out = nn.Linear(dim, dim)
        self.position_bias = nn.Embedding(max_length, 1)  # by the distance, the same for all heads
        self.time_bias = nn.Embedding(NUM_TIME_BUCKETS, 1) if times else None
        self.dropout = Dropout(dropout)
        nn.init.normal_(self.uvqk.weight, std=INIT_STD)
        nn.init.xavier_uniform_(self.out.weight)
        nn.init.zeros_(self.out.bias)
        for bias in (self.position_bias, self.time_bias):
            if bias is not None:
                nn.init.normal_(bias.weight, std=INIT_STD)

    def forward(self, x_BLd: Tensor, relations: Relations) -> Tensor:
        """`[B, L, d]` to `[B, L, d]`."""
        dim = x_BLd.shape[-1]
        u_BLd, v, q, k = F.silu(self.uvqk(F.layer_norm(x_BLd, (dim,), eps=NORM_EPS))).chunk(4, dim=-1)
        q_BHLc, k_BHLc, v_BHLc = (self._by_head(y) for y in (q, k, v))
        logit_BHLL = q_BHLc @ k_BHLc.transpose(-1, -2) + self._bias(relations)
        weight_BHLL = F.silu(logit_BHLL).tril() / self.max_length
        mixed_BLd = (weight_BHLL @ v_BHLc).transpose(1, 2).flatten(2)
        gated_BLd = F.layer_norm(mixed_BLd, (dim,), eps=NORM_EPS) * u_BLd
        changed_BLd: Tensor = x_BLd + self.out(self.dropout(gated_BLd))
        return changed_BLd

    def _by_head(self, y_BLd: Tensor) -> Tensor:
        b, length, dim = y_BLd.shape
        return y_BLd.view(b, length, self.heads, dim // self.heads).transpose(1, 2)

    def _bias(self, relations: Relations) -> Tensor:
        """`[B or 1, 1, L, L]`."""
        bias_LL = look_up(self.position_bias, relations.distance_LL)
        if self.time_bias is None or relations.time_BLL is None:
            return bias_LL[None, None]
        return (look_up(self.time_bias, relations.time_BLL) + bias_LL)[:, None]
