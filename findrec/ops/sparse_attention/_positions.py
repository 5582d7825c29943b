"""The three branches at single positions, to predict from the last step of a history.

Only the keys that a query attends to are read: its window, the compressed blocks and n selected blocks.

Shape letters: B rows, P queries of a row, K keys of a query, H heads, G groups of heads, h width of a head.
"""

from __future__ import annotations

import torch
from torch import Tensor

from findrec.ops.sparse_attention.importance import select_blocks, visible_blocks
from findrec.ops.sparse_attention.sizes import SparseSizes


def window_at(q: Tensor, k: Tensor, v: Tensor, position_BP: Tensor, sizes: SparseSizes) -> Tensor:
    """Attention `[B, P, H, h]` to the latest `window` steps."""
    step_BPK = position_BP[..., None] - torch.arange(sizes.window, device=q.device)
    return _attend_steps(q, k, v, step_BPK[:, None], step_BPK[:, None] >= 0)


def block_at(q: Tensor, k: Tensor, v: Tensor, position_BP: Tensor, sizes: SparseSizes) -> Tensor:
    """Attention `[B, P, H, h]` to the compressed blocks that have ended; zero before the first has."""
    b, num_queries, heads, width = q.shape
    groups = k.shape[2]
    if not k.shape[1]:
        return torch.zeros_like(q)
    grouped = q.view(b, num_queries, groups, heads // groups, width)
    logits = torch.einsum("bpgrh,bngh->bgrpn", grouped, k) * width**-0.5
    seen_BPN = torch.arange(k.shape[1], device=q.device) < visible_blocks(position_BP, sizes)[..., None]
    weights = _masked_softmax(logits, seen_BPN[:, None, None])
    return torch.einsum("bgrpn,bngh->bpgrh", weights, v).reshape(b, num_queries, heads, width)


def selective_at(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    leader_q: Tensor,
    scorer_k: Tensor,
    position_BP: Tensor,
    sizes: SparseSizes,
) -> Tensor:
    """Attention `[B, P, H, h]` to the selected blocks, chosen by the queries `leader_q` `[B, P, H, h]`."""
    leader_BP = leader_positions(position_BP, sizes)
    chosen, valid = select_blocks(leader_q, scorer_k, leader_BP, k.shape[1], sizes)
    inside = torch.arange(sizes.selected_block, device=q.device)
    step = (chosen[..., None] * sizes.selected_block + inside).flatten(3)  # [B, G, P, K]
    seen = valid[..., None].expand(*valid.shape, len(inside)).flatten(3)
    return _attend_steps(q, k, v, step, seen & (step <= position_BP[:, None, :, None]))


def leader_positions(position: Tensor, sizes: SparseSizes) -> Tensor:
    """The positions of the queries that choose the blocks for those at `position`; same shape."""
    return position - position % sizes.share


def _attend_steps(q: Tensor, k: Tensor, v: Tensor, step: Tensor, seen: Tensor) -> Tensor:
    """Attention of each query to the steps `[B, G or 1, P, K]` where `seen`."""
    b, num_queries, heads, width = q.shape
    groups = k.shape[2]
    step = step.clamp(0, k.shape[1] - 1).expand(-1, groups, -1, -1)
    row = torch.arange(b, device=q.device).view(-1, 1, 1, 1)
    group = torch.arange(groups, device=q.device).view(1, -1, 1, 1)
    keys, values = k[row, step, group], v[row, step, group]  # [B, G, P, K, h]
    grouped = q.view(b, num_queries, groups, heads // groups, width)
    logits = torch.einsum("bpgrh,bgpkh->bgrpk", grouped, keys) * width**-0.5
    weights = _masked_softmax(logits, seen[:, :, None])
    return torch.einsum("bgrpk,bgpkh->bpgrh", weights, values).reshape(b, num_queries, heads, width)


def _masked_softmax(logits: Tensor, seen: Tensor) -> Tensor:
    """Softmax over the entries where `seen`, in at least float32; zero where there are none."""
    hidden = ~seen
    dtype = torch.promote_types(logits.dtype, torch.float32)
    low = torch.finfo(dtype).min
    weights = logits.to(dtype).masked_fill(hidden, low).softmax(-1).masked_fill(hidden, 0)
    return weights.to(logits.dtype)
