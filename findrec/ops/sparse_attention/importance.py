"""Which blocks a query selects, from its attention to the compressed blocks.

A compressed block i covers the steps i d .. i d + l - 1, a selection block j the steps j l' .. j l' + l' - 1.
The importance of j is the sum of the attention weights of the compressed blocks, each times the number of
units of d steps that it shares with j, summed over the query heads of a group (arXiv 2502.11089, equations 9
and 10). The choice is not differentiated.

Shape letters: B rows, P queries, H heads, G groups of heads, N compressed blocks, J selection blocks.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from findrec.ops.sparse_attention.sizes import SparseSizes

_CHUNK = 1024  # queries whose weights are in memory at a time
# Scores of the blocks that are always selected, above any importance; the query's own block comes first.
_OWN, _PREVIOUS, _FIRST = 3e9, 2e9, 1e9


def visible_blocks(position: Tensor, sizes: SparseSizes) -> Tensor:
    """The number of compressed blocks that end at or before each position; same shape."""
    ended = torch.div(position + 1 - sizes.block, sizes.stride, rounding_mode="floor") + 1
    return ended.clamp(min=0)


def shared_units(sizes: SparseSizes) -> Tensor:
    """`[l'/d + l/d - 1]` float32: units of d steps that selection block j shares with the compressed blocks.

    Entry k belongs to the compressed block j l'/d - (l/d - 1) + k; all others share none.
    """
    own, others = sizes.selected_block // sizes.stride, sizes.block // sizes.stride
    first = torch.arange(1 - others, own)
    return (torch.clamp(first + others, max=own) - first.clamp(min=0)).float()


@torch.no_grad()
def select_blocks(
    q_BPHh: Tensor, k_BNGh: Tensor, position_BP: Tensor, length: int, sizes: SparseSizes
) -> tuple[Tensor, Tensor]:
    """The blocks that queries at `position_BP` select in a sequence of `length` steps.

    Returns `(chosen, valid)`, both `[B, G, P, n]` with n = min(selected, J): block numbers in descending
    order of score, the own block first, and whether they exist for the query. Equal scores are taken in the
    order of the blocks.
    """
    with torch.autocast(q_BPHh.device.type, enabled=False):
        # float64 where the inputs are, float32 for half precision.
        dtype = torch.float64 if q_BPHh.dtype == torch.float64 else torch.float32
        k_BNGh, parts = k_BNGh.to(dtype), []
        for lo in range(0, q_BPHh.shape[1], _CHUNK):
            some = slice(lo, lo + _CHUNK)
            parts.append(_select(q_BPHh[:, some].to(dtype), k_BNGh, position_BP[:, some], length, sizes))
    chosen, valid = zip(*parts, strict=True)
    return torch.cat(chosen, dim=2), torch.cat(valid, dim=2)


def _select(
    q_BPHh: Tensor, k_BNGh: Tensor, position_BP: Tensor, length: int, sizes: SparseSizes
) -> tuple[Tensor, Tensor]:
    num_selectable = sizes.num_selectable(length)
    score = importance(q_BPHh, k_BNGh, position_BP, num_selectable, sizes)  # [B, G, P, J]
    block_J = torch.arange(num_selectable, device=score.device)
    own = torch.div(position_BP, sizes.selected_block, rounding_mode="floor")[:, None, :, None]
    score = score.masked_fill(block_J == 0, _FIRST)
    score = score.masked_fill(block_J == own - 1, _PREVIOUS)
    score = score.masked_fill(block_J == own, _OWN)
    score = score.masked_fill(block_J > own, -1.0)
    # Stable: in the few blocks there are, a full sort costs little, and ties are the same everywhere.
    sorted_score, order = score.sort(dim=-1, descending=True, stable=True)
    return order[..., : sizes.selected], sorted_score[..., : sizes.selected] >= 0


def importance(
    q_BPHh: Tensor, k_BNGh: Tensor, position_BP: Tensor, num_selectable: int, sizes: SparseSizes
) -> Tensor:
    """Importance `[B, G, P, J]` of the selection blocks for queries at `position_BP`."""
    b, num_queries, heads, width = q_BPHh.shape
    num_blocks, groups = k_BNGh.shape[1:3]
    if not num_blocks:
        return q_BPHh.new_zeros(b, groups, num_queries, num_selectable)
    q = q_BPHh.view(b, num_queries, groups, heads // groups, width)
    logits = torch.einsum("bpgrh,bngh->bgrpn", q, k_BNGh) * width**-0.5
    seen_BPN = torch.arange(num_blocks, device=q.device) < visible_blocks(position_BP, sizes)[..., None]
    hidden = ~seen_BPN[:, None, None]
    weights = logits.masked_fill(hidden, torch.finfo(logits.dtype).min).softmax(-1).masked_fill(hidden, 0)
    return _sum_shared(weights.sum(2), num_selectable, sizes)


def _sum_shared(weights_BGPN: Tensor, num_selectable: int, sizes: SparseSizes) -> Tensor:
    """The weights of the compressed blocks, summed over those that overlap each selection block."""
    kernel = shared_units(sizes).to(weights_BGPN)
    units, before = sizes.selected_block // sizes.stride, sizes.block // sizes.stride - 1
    # Compressed blocks before the first and after the last have no weight.
    after = (num_selectable - 1) * units + len(kernel) - before - weights_BGPN.shape[-1]
    padded = F.pad(weights_BGPN, (before, after)).flatten(0, 2)[:, None]
    return F.conv1d(padded, kernel[None, None], stride=units).view(*weights_BGPN.shape[:3], -1)
