"""Exact causal attention to the latest steps, in O(L w) time and memory.

Queries are processed in blocks of w/2 with the 3w/2 keys they may need, under one shared mask (on CPU two
thirds of the time of blocks of w). The window depends neither on the length nor on block boundaries.

Shape letters: X rows, L steps, H heads, h width of a head.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

_SMALLEST_BLOCK = 32  # steps; smaller blocks spend their time on overhead


def windowed_attention(q: Tensor, k: Tensor, v: Tensor, window: int | None) -> Tensor:
    """`[X, L, H, h]` in and out; a step attends to the latest `window` steps up to itself (None: all)."""
    if window is None or window >= q.shape[1]:
        return attend(q, k, v, None)
    return _in_blocks(q, k, v, window)


def attend(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> Tensor:
    """Fused attention over `[X, L, H, h]`; causal without a mask."""
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))
    mixed = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, is_causal=mask is None)
    return mixed.transpose(1, 2)


def _in_blocks(q: Tensor, k: Tensor, v: Tensor, window: int) -> Tensor:
    """Exact sliding window over `[X, L, H, h]`, L > window."""
    x, length, heads, width = q.shape
    block = max(window // 2, _SMALLEST_BLOCK)
    back = -(-(window - 1) // block)  # earlier blocks that a query may attend to
    head = min(back * block, length)  # the first queries have a shorter look-back: computed separately
    parts = (
        [attend(q[:, :head], k[:, :head], v[:, :head], band(head, head, window, q.device))] if head else []
    )
    if length > head:
        fill = -(length - head) % block
        q, k, v = (F.pad(part, (0, 0, 0, 0, 0, fill)) for part in (q[:, head:], k, v))
        num_blocks = q.shape[1] // block
        q_blocks = q.reshape(x * num_blocks, block, heads, width)
        k_blocks, v_blocks = (
            # Copies each key `back + 1` times: overlapping views are slower, forward and backward.
            torch.cat([part[:, i : i + num_blocks] for i in range(back + 1)], dim=2).flatten(0, 1)
            for part in (y.reshape(x, num_blocks + back, block, heads, width) for y in (k, v))
        )
        mask = band(block, (back + 1) * block, window, q.device)
        mixed = attend(q_blocks, k_blocks, v_blocks, mask)
        parts.append(mixed.reshape(x, num_blocks * block, heads, width)[:, : length - head])
    return torch.cat(parts, dim=1)


def band(queries: int, keys: int, window: int, device: torch.device) -> Tensor:
    """Mask `[queries, keys]` of the last `queries` of `keys` steps: True for the latest `window` keys."""
    own = torch.arange(keys - queries, keys, device=device)[:, None]
    other = torch.arange(keys, device=device)[None]
    return (other <= own) & (other > own - window)
