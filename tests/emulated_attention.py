"""The fused attention of the emulated device (emulated_card.py), by that of the CPU."""

from __future__ import annotations

from typing import Any

import torch


def attention(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    bias: torch.Tensor | None = None,
    dropout: float = 0.0,
    causal: bool = False,
    *_: Any,
    scale: float | None = None,
    **__: Any,
) -> Any:
    """Fused attention: the output, its log-sum-exp, and what the backward pass on a GPU needs beside them."""
    out, total = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(
        q, k, v, dropout, causal, attn_mask=bias, scale=scale
    )
    none = torch.zeros(0, dtype=torch.int64)
    return out, total, none, none, q.shape[2], k.shape[2], none, none, none


def attention_backward(
    grad: torch.Tensor,
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    bias: torch.Tensor | None,
    wanted: list[bool],
    out: torch.Tensor,
    total: torch.Tensor,
    cum_q: Any,
    cum_k: Any,
    max_q: int,
    max_k: int,
    dropout: float,
    causal: bool,
    *_: Any,
    scale: float | None = None,
) -> Any:
    grads = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward(
        grad, q, k, v, out, total, dropout, causal, attn_mask=bias, scale=scale
    )
    return (*grads, None)


ATTENTION = {
    "_scaled_dot_product_fused_attention_overrideable": attention,
    "_scaled_dot_product_fused_attention_overrideable_backward": attention_backward,
}
