"""Causal attention between the ID stream and each modality, all directions and heads in one fused call.

For every modality m two attentions run: its latents ask the ID stream (what does the history say about this
content), and the ID stream asks its latents (which content speaks to this history). Modalities reach each
other through the ID stream, which keeps the cost linear in their number. Each is causal over time inside one
user's history; users never see each other. No L x L mask or weight matrix is stored.

Shape letters: M modalities, B rows, L steps, H heads, h width of a head.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F


def cross_modal_attention(id_qkv: Tensor, modal_qkv: Tensor) -> tuple[Tensor, Tensor]:
    """Attend in both directions between the ID stream and M modalities.

    `id_qkv` is `[B, L, 3, H, h]`, `modal_qkv` is `[M, B, L, 3, H, h]`: queries, keys, values. Logits are
    scaled once, by h^-0.5. Returns `(modal_reads_id, id_reads_modal)`, both `[M, B, L, H, h]`.
    Raises `ValueError` for shapes that do not fit.
    """
    if modal_qkv.ndim != 6 or modal_qkv.shape[1:] != id_qkv.shape or id_qkv.shape[2] != 3:
        raise ValueError(
            f"expected id_qkv [B, L, 3, H, h] and modal_qkv [M, B, L, 3, H, h], not {tuple(id_qkv.shape)} "
            f"and {tuple(modal_qkv.shape)}"
        )
    num_modal, b, length, _, heads, width = modal_qkv.shape
    id_parts = id_qkv.unsqueeze(0).expand_as(modal_qkv).unbind(3)
    modal_parts = modal_qkv.unbind(3)
    q = torch.stack([modal_parts[0], id_parts[0]])  # [2, M, B, L, H, h]
    k, v = (torch.stack([id_parts[part], modal_parts[part]]) for part in (1, 2))
    q, k, v = (x.view(-1, length, heads, width).transpose(1, 2) for x in (q, k, v))
    mixed = F.scaled_dot_product_attention(q, k, v, is_causal=True)
    both = mixed.transpose(1, 2).reshape(2, num_modal, b, length, heads, width)
    return both[0], both[1]
