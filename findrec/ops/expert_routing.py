"""Mixture of experts inside each head's subspace: every head sends its vector through experts of its own.

All heads and experts are two batched matrix products around a gate-weighted sum. The balance term is that of
the Switch Transformer (Fedus et al. 2021, eq. 4), the z term that of ST-MoE (Zoph et al. 2022, eq. 5).

Shape letters: T positions, H heads, i input width of a head, E experts, o output width of an expert.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F


@dataclass(frozen=True)
class Routed:
    """What came out of the experts, and how evenly they were used."""

    out_THo: Tensor
    gates_THE: Tensor  # non-negative, sum to 1 over experts
    balance: Tensor  # [] mean over heads of E * sum_e f_e P_e: 1 when even, E when one expert takes all
    z: Tensor  # [] mean squared log-sum-exp of the logits: keeps them small


def expert_routing(
    x_THi: Tensor,
    logits_THE: Tensor,
    weight_HEio: Tensor,
    bias_HEo: Tensor,
    *,
    temperature: float = 1.0,
    top_k: int | None = None,
) -> Routed:
    """`sum_e gate_e GELU(x W_e + b_e)` for each head, gates = softmax(logits / temperature).

    With `top_k` only the largest k gates count, renormalised to sum to 1; all experts are still computed (on
    CPU at these widths one dense product is faster than gathering rows), so it changes results, not cost.
    f_e, the share of positions whose first choice is expert e, is a constant; P_e, the mean gate, carries
    the gradient. Zero positions give zero terms. Raises `ValueError` for a `top_k` outside 1..E.
    """
    num_experts = logits_THE.shape[-1]
    if top_k is not None and not 1 <= top_k <= num_experts:
        raise ValueError(f"top_k must lie in 1..{num_experts}, the number of experts, not {top_k}")
    probability_THE = torch.softmax(logits_THE / temperature, dim=-1)
    gates_THE = probability_THE
    if top_k is not None and top_k < num_experts:
        chosen = torch.zeros_like(gates_THE).scatter_(-1, gates_THE.topk(top_k, dim=-1).indices, 1.0)
        gates_THE = gates_THE * chosen
        gates_THE = gates_THE / gates_THE.sum(-1, keepdim=True)

    t, heads, width = x_THi.shape
    out_width = weight_HEio.shape[-1]
    weight_HiX = weight_HEio.transpose(1, 2).reshape(heads, width, num_experts * out_width)
    bias_H1X = bias_HEo.reshape(heads, 1, num_experts * out_width)
    hidden_HTX = F.gelu(torch.baddbmm(bias_H1X, x_THi.transpose(0, 1), weight_HiX))
    hidden_HTEo = hidden_HTX.view(heads, t, num_experts, out_width)
    out_HTo = (gates_THE.transpose(0, 1).unsqueeze(2) @ hidden_HTEo).squeeze(2)

    first_HE = F.one_hot(probability_THE.detach().argmax(-1), num_experts).to(x_THi.dtype).sum(0)
    share_HE = first_HE / max(1, t)
    mean_HE = probability_THE.sum(0) / max(1, t)
    balance = num_experts * (share_HE * mean_HE).sum(-1).mean()
    z = torch.logsumexp(logits_THE, dim=-1).square().sum() / max(1, t * heads)
    return Routed(out_HTo.transpose(0, 1), gates_THE, balance, z)
