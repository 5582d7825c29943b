"""Causal attention between the ID stream and each modality, all directions and heads in one call.

For every modality two attentions are computed: its latents are the queries over the ID stream, and the ID
stream holds the queries over its latents. Modalities exchange information through the ID stream only, so the
cost is linear in their number. Attention is causal within one user's history and never crosses users; right
padding is invisible to all steps before it.

A step attends to all steps up to itself or, with `window` w, to the last w of them, itself included. The
window is exact, and time and memory are then O(L w) (`_sliding_window`).

Shape letters: M modalities, B rows, L steps, H heads, h width of a head, X = 2 M B.
"""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

from findrec.ops._sliding_window import band, windowed_attention

Impl = Literal["auto", "reference", "sdpa"]


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
    else:
        mixed = windowed_attention(q, k, v, window)
    both = mixed.reshape(2, num_modal, b, length, heads, width)
    return both[0], both[1]


def _dense_attention(q: Tensor, k: Tensor, v: Tensor, window: int) -> Tensor:
    length, width = q.shape[1], q.shape[3]
    logits = torch.einsum("xlhc,xmhc->xhlm", q.double(), k.double()) * width**-0.5
    weights = logits.masked_fill(~band(length, length, window, q.device), -torch.inf).softmax(-1)
    return torch.einsum("xhlm,xmhc->xlhc", weights, v.double()).to(q.dtype)
