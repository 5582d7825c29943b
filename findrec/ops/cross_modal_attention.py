"""Causal attention between the ID stream and each modality, all directions and heads in one call.

For every modality two attentions are computed: its latents are the queries over the ID stream, and the ID
stream holds the queries over its latents. Modalities exchange information through the ID stream only, so the
cost is linear in their number. Attention is causal within one user's history and never crosses users; right
padding is invisible to all steps before it.

A step attends to all steps up to itself or, with `window` w, to the last w of them, itself included. The
window is exact: it depends neither on the length nor on block boundaries. Windowed queries are processed in
blocks of w/2 with the 3w/2 keys they may need, under one shared mask (on CPU two thirds of the time of blocks
of w), so time and memory are O(L w).

Shape letters: M modalities, B rows, L steps, H heads, h width of a head, X = 2 M B, N blocks, b their steps.
"""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor
from torch.nn import functional as F

Impl = Literal["auto", "reference", "sdpa"]
_SMALLEST_BLOCK = 32  # steps; smaller blocks spend their time on overhead


def cross_modal_attention(
    id_qkv: Tensor, modal_qkv: Tensor, *, window: int | None = None, impl: Impl = "auto"
) -> tuple[Tensor, Tensor]:
    """Attend in both directions between the ID stream and M modalities.

    `id_qkv` is `[B, L, 3, H, h]`, `modal_qkv` is `[M, B, L, 3, H, h]`: queries, keys, values. Logits are
    scaled once, by h^-0.5. `window` is the number of latest steps that a step attends to; None: all.
    `impl="reference"` forms all L x L weights in float64; `auto` is `sdpa`, torch's fused attention.
    Returns `(modal_reads_id, id_reads_modal)`, both `[M, B, L, H, h]`.
    Raises `ValueError` for shapes that do not fit, a window below 1 or an unknown `impl`.
    """
    if modal_qkv.ndim != 6 or modal_qkv.shape[1:] != id_qkv.shape or id_qkv.shape[2] != 3:
        raise ValueError(
            f"expected id_qkv [B, L, 3, H, h] and modal_qkv [M, B, L, 3, H, h], not {tuple(id_qkv.shape)} "
            f"and {tuple(modal_qkv.shape)}"
        )
    if window is not None and window < 1:
        raise ValueError(
            f"window={window}: must be at least 1 (a step attends to itself), or None for all steps"
        )
    if impl not in ("auto", "reference", "sdpa"):
        raise ValueError(f"implementation {impl!r} is unknown: 'auto', 'reference' or 'sdpa'")
    num_modal, b, length, _, heads, width = modal_qkv.shape
    id_parts = id_qkv.unsqueeze(0).expand_as(modal_qkv).unbind(3)
    modal_parts = modal_qkv.unbind(3)
    q = torch.stack([modal_parts[0], id_parts[0]])  # [2, M, B, L, H, h]
    k, v = (torch.stack([id_parts[part], modal_parts[part]]) for part in (1, 2))
    q, k, v = (x.view(-1, length, heads, width) for x in (q, k, v))
    if impl == "reference":
        mixed = _dense_attention(q, k, v, window or length)
    elif window is None or window >= length:
        mixed = _attend(q, k, v, None)
    else:
        mixed = _in_blocks(q, k, v, window)
    both = mixed.reshape(2, num_modal, b, length, heads, width)
    return both[0], both[1]


def _attend(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> Tensor:
    """`[X, L, H, h]` in and out; causal without a mask."""
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
        [_attend(q[:, :head], k[:, :head], v[:, :head], _band(head, head, window, q.device))] if head else []
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
        mask = _band(block, (back + 1) * block, window, q.device)
        mixed = _attend(q_blocks, k_blocks, v_blocks, mask)
        parts.append(mixed.reshape(x, num_blocks * block, heads, width)[:, : length - head])
    return torch.cat(parts, dim=1)


def _band(queries: int, keys: int, window: int, device: torch.device) -> Tensor:
    """Mask `[queries, keys]` of the last `queries` of `keys` steps: True for the latest `window` keys."""
    own = torch.arange(keys - queries, keys, device=device)[:, None]
    other = torch.arange(keys, device=device)[None]
    return (other <= own) & (other > own - window)


def _dense_attention(q: Tensor, k: Tensor, v: Tensor, window: int) -> Tensor:
    length, width = q.shape[1], q.shape[3]
    logits = torch.einsum("xlhc,xmhc->xhlm", q.double(), k.double()) * width**-0.5
    weights = logits.masked_fill(~_band(length, length, window, q.device), -torch.inf).softmax(-1)
    return torch.einsum("xhlm,xmhc->xlhc", weights, v.double()).to(q.dtype)
