"""The oracle: dense attention in float64 under boolean masks that loops build from the definitions."""

from __future__ import annotations

import torch
from torch import Tensor

from findrec.ops.sparse_attention.sizes import SparseSizes


def window_mask(length: int, sizes: SparseSizes) -> Tensor:
    """`[L, L]` bool: the latest `window` steps up to each step."""
    mask = torch.zeros(length, length, dtype=torch.bool)
    for t in range(length):
        mask[t, max(0, t - sizes.window + 1) : t + 1] = True
    return mask


def block_mask(length: int, sizes: SparseSizes) -> Tensor:
    """`[L, N]` bool: compressed blocks that end at or before each step."""
    mask = torch.zeros(length, sizes.num_blocks(length), dtype=torch.bool)
    for t in range(length):
        for i in range(mask.shape[1]):
            mask[t, i] = i * sizes.stride + sizes.block - 1 <= t
    return mask


def selection_mask(scorer_q: Tensor, scorer_k: Tensor, sizes: SparseSizes) -> Tensor:
    """`[B, G, L, L]` bool: the steps of the blocks that each query, or the first of its share, selects."""
    b, length, heads, _ = scorer_q.shape
    groups = scorer_k.shape[2]
    weights = attention_weights(scorer_q, scorer_k, block_mask(length, sizes)[None, None])
    mask = torch.zeros(b, groups, length, length, dtype=torch.bool)
    for row in range(b):
        for group in range(groups):
            own_heads = slice(group * heads // groups, (group + 1) * heads // groups)
            for t in range(length):
                leader = t - t % sizes.share
                for block in _chosen(weights[row, own_heads, leader].sum(0), leader, sizes):
                    start = block * sizes.selected_block
                    mask[row, group, t, start : min(start + sizes.selected_block, t + 1)] = True
    return mask


def _chosen(weight_N: Tensor, position: int, sizes: SparseSizes) -> list[int]:
    """The blocks selected by the query at `position`, from its weights of the compressed blocks."""
    own = position // sizes.selected_block
    always = list(dict.fromkeys(j for j in (own, own - 1, 0) if j >= 0))
    a, c = sizes.selected_block // sizes.stride, sizes.block // sizes.stride
    importance = {}
    for j in range(own + 1):  # equation 9 of arXiv 2502.11089, from 0
        terms = [a * j + m - n for m in range(a) for n in range(c)]
        importance[j] = sum(float(weight_N[i]) for i in terms if 0 <= i < len(weight_N))
    others = sorted((j for j in importance if j not in always), key=lambda j: (-importance[j], j))
    return (always + others)[: sizes.selected]


def attention_weights(q: Tensor, k: Tensor, mask: Tensor) -> Tensor:
    """`[B, H, L, K]` softmax weights of `q` `[B, L, H, h]` over `k` `[B, K, G, h]`; zero where none is seen.

    `mask` is `[1 or B, 1 or G, L, K]`.
    """
    repeats = q.shape[2] // k.shape[2]
    k = k.double().repeat_interleave(repeats, dim=2)
    logits = torch.einsum("blhc,bkhc->bhlk", q.double(), k) * q.shape[-1] ** -0.5
    seen = mask.to(q.device).repeat_interleave(repeats, dim=1) if mask.shape[1] > 1 else mask.to(q.device)
    exp = torch.exp(logits - logits.detach().amax(-1, keepdim=True)) if logits.shape[-1] else logits
    exp = exp * seen
    return exp / exp.sum(-1, keepdim=True).clamp(min=1e-300)


def dense_attention(q: Tensor, k: Tensor, v: Tensor, mask: Tensor) -> Tensor:
    """`[B, L, H, h]` in float64."""
    weights = attention_weights(q, k, mask)
    v = v.double().repeat_interleave(q.shape[2] // v.shape[2], dim=2)
    return torch.einsum("bhlk,bkhc->blhc", weights, v)
