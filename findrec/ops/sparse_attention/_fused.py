"""The three branches at all positions, by torch's fused attention over blocks of queries.

All of them need memory linear in the length: the scores of a branch are never stored, and the keys of the
selective branch are gathered once for all queries that share a selection.

Shape letters: B rows, L steps, H heads, G groups of heads, N compressed blocks, J selection blocks, S
selections of a block, h width of a head.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from findrec.ops._sliding_window import attend, windowed_attention
from findrec.ops.sparse_attention.importance import select_blocks, visible_blocks
from findrec.ops.sparse_attention.sizes import SparseSizes

_CHUNK = 1024  # queries that attend to compressed blocks in one call, which sees only blocks before its end


def window_branch(q: Tensor, k: Tensor, v: Tensor, sizes: SparseSizes) -> Tensor:
    """Attention `[B, L, H, h]` to the latest `window` steps."""
    return windowed_attention(q, for_heads(k, q), for_heads(v, q), sizes.window)


def for_heads(x_BLGh: Tensor, q: Tensor) -> Tensor:
    """Keys or values of each head, from those of its group."""
    repeats = q.shape[2] // x_BLGh.shape[2]
    return x_BLGh if repeats == 1 else x_BLGh.repeat_interleave(repeats, dim=2)


def block_branch(q: Tensor, k_BNGh: Tensor, v_BNGh: Tensor, sizes: SparseSizes) -> Tensor:
    """Attention `[B, L, H, h]` to the compressed blocks that have ended; zero before the first has."""
    length, before = q.shape[1], min(q.shape[1], sizes.block - 1)
    k, v = for_heads(k_BNGh, q), for_heads(v_BNGh, q)
    parts = [torch.zeros_like(q[:, :before])]
    for lo in range(before, length, _CHUNK):
        hi = min(length, lo + _CHUNK)
        seen = visible_blocks(torch.arange(lo, hi, device=q.device), sizes)
        end = sizes.num_blocks(hi)
        mask = torch.arange(end, device=q.device) < seen[:, None]
        parts.append(attend(q[:, lo:hi], k[:, :end], v[:, :end], mask))
    return torch.cat(parts, dim=1)


def selective_branch(
    q: Tensor, k: Tensor, v: Tensor, scorer_q: Tensor, scorer_k_BNGh: Tensor, sizes: SparseSizes
) -> Tensor:
    """Attention `[B, L, H, h]` to the steps of the selected blocks.

    `scorer_q` and `scorer_k_BNGh` are the queries and keys of the block branch. The first n l' steps see all
    of the past; every later one has n complete choices, of which only its own block reaches into the future.
    """
    length, near = q.shape[1], min(q.shape[1], sizes.selected * sizes.selected_block)
    head = attend(q[:, :near], for_heads(k[:, :near], q), for_heads(v[:, :near], q), None)
    if near == length:
        return head
    leader = torch.arange(near, length, sizes.share, device=q.device)
    leader_BP = leader.expand(len(q), -1)
    chosen, _ = select_blocks(scorer_q[:, near :: sizes.share], scorer_k_BNGh, leader_BP, length, sizes)
    far = _attend_selected(q, k, v, chosen, near, sizes)
    return torch.cat([head, far], dim=1)


def _attend_selected(
    q: Tensor, k: Tensor, v: Tensor, chosen_BGPn: Tensor, near: int, sizes: SparseSizes
) -> Tensor:
    """Attention of the steps from `near` on to their chosen blocks, the own one being the first."""
    b, length, heads, width = q.shape
    groups, size, share = k.shape[2], sizes.selected_block, sizes.share
    fill = -length % size
    num_blocks = (length + fill) // size
    late, repeats, per_block = num_blocks - near // size, heads // groups, size // share
    q = F.pad(q[:, near:], (0, 0, 0, 0, 0, fill)).view(b, late, per_block, share, groups, repeats, width)
    q = q.permute(0, 4, 1, 2, 5, 3, 6).reshape(b * groups * late, per_block, repeats * share, width)
    missing = late * per_block - chosen_BGPn.shape[2]  # selections of padding alone
    chosen = F.pad(chosen_BGPn, (0, 0, 0, missing))
    first_BG11 = torch.arange(b * groups, device=q.device).view(b, groups, 1, 1) * num_blocks
    rows = (first_BG11 + chosen).flatten()
    gathered = []
    for x in (k, v):
        x = F.pad(x, (0, 0, 0, 0, 0, fill)).view(b, num_blocks, size, groups, width)
        x = x.permute(0, 3, 1, 2, 4).reshape(b * groups * num_blocks, size * width)
        gathered.append(x.index_select(0, rows).view(len(q), per_block, -1, width))
    mask = _own_block_mask(gathered[0].shape[2], repeats, sizes, q.device)
    mixed = F.scaled_dot_product_attention(q, gathered[0], gathered[1], attn_mask=mask)
    mixed = mixed.view(b, groups, late, per_block, repeats, share, width).permute(0, 2, 3, 5, 1, 4, 6)
    return mixed.reshape(b, late * size, heads, width)[:, : length - near]


def _own_block_mask(keys: int, repeats: int, sizes: SparseSizes, device: torch.device) -> Tensor:
    """`[1, S, repeats * share, keys]`: the first l' keys, of the own block, are seen causally."""
    step_S = torch.arange(sizes.selected_block, device=device).view(-1, 1, sizes.share, 1)
    key = torch.arange(keys, device=device)
    seen = (key <= step_S) | (key >= sizes.selected_block)
    return seen.expand(-1, repeats, -1, -1).flatten(1, 2)[None]
