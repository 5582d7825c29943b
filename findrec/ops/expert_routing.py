"""Mixture of experts per head: each head routes its vector to its own set of experts.

The balance term is that of the Switch Transformer (Fedus et al. 2021, eq. 4), the z term that of ST-MoE
(Zoph et al. 2022, eq. 5). No implementation loops over heads or experts:

| impl        | what                                                                                  |
|-------------|---------------------------------------------------------------------------------------|
| `reference` | two einsums in float64                                                                |
| `dense`     | every expert for every position: batched products and gate-weighted sums, in chunks   |
| `sparse`    | only the `top_k` chosen experts: rows grouped by head and expert, padded to one size   |

`auto` is `sparse` when at most a quarter of the experts is chosen, else `dense`. On a CPU, both directions
with top_k = 2, `dense` is the faster at 4 experts; at 16 `sparse` takes half its time or less.

Shape letters: T positions, H heads, i input width of a head, E experts, o output width of an expert,
k chosen experts, G = H E groups, c rows of the fullest group, R = T H k rows of all groups.
"""

from __future__ import annotations

from typing import Literal, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from findrec.ops._tiles import tile_bytes

Impl = Literal["auto", "reference", "dense", "sparse"]
_CHUNK_BYTES = 1 << 20  # of the hidden activations in float32 per chunk: they stay in the CPU cache


class Routed(NamedTuple):
    """The experts' output, and the two auxiliary terms that keep routing balanced."""

    out_THo: Tensor
    gates_THE: Tensor  # non-negative, sum to 1 over experts; at least float32, as the two terms are
    balance: Tensor  # [] mean over heads of E * sum_e f_e P_e: 1 when even, E when one expert takes all
    z: Tensor  # [] mean squared log-sum-exp of the logits: penalises large logits


def expert_routing(
    x_THi: Tensor,
    logits_THE: Tensor,
    weight_HEio: Tensor,
    bias_HEo: Tensor,
    *,
    temperature: float = 1.0,
    top_k: int | None = None,
    impl: Impl = "auto",
) -> Routed:
    """`sum_e gate_e GELU(x W_e + b_e)` for each head, gates = softmax(logits / temperature).

    With `top_k` only the largest k gates count, renormalised to sum to 1 (so with `top_k=1` the gate is the
    constant 1, and the router learns from the two terms alone). f_e, the share of positions whose
    first choice is expert e, is a constant; P_e, the mean gate before `top_k`, carries the gradient, so going
    down the balance term takes load from the fullest expert. Zero positions give zero terms.
    Raises `ValueError` for a `top_k` outside 1..E or an unknown `impl`.
    """
    num_experts = logits_THE.shape[-1]
    if top_k is not None and not 1 <= top_k <= num_experts:
        raise ValueError(f"top_k must lie in 1..{num_experts}, the number of experts, not {top_k}")
    if impl not in ("auto", "reference", "dense", "sparse"):
        raise ValueError(f"implementation {impl!r} is unknown: 'auto', 'reference', 'dense' or 'sparse'")
    if logits_THE.dtype != torch.float64:
        logits_THE = logits_THE.float()  # half precision is too coarse to choose by (Fedus et al., 2.4)
    probability_THE = torch.softmax(logits_THE / temperature, dim=-1)
    gates_THk, chosen_THk = probability_THE.topk(top_k or num_experts, dim=-1)
    gates_THE = probability_THE
    if top_k is not None:
        gates_THk = gates_THk / gates_THk.sum(-1, keepdim=True)
        gates_THE = torch.zeros_like(probability_THE).scatter(-1, chosen_THk, gates_THk)
    if impl == "reference":
        out_THo = _einsums(x_THi, gates_THE, weight_HEio, bias_HEo)
    elif impl == "sparse" or (impl == "auto" and 4 * chosen_THk.shape[-1] <= num_experts):
        out_THo = _chosen_experts(x_THi, gates_THk, chosen_THk, weight_HEio, bias_HEo)
    else:
        out_THo = _all_experts(x_THi, gates_THE, weight_HEio, bias_HEo)

    t, heads = probability_THE.shape[:2]
    first_HE = F.one_hot(chosen_THk[..., 0], num_experts).to(probability_THE.dtype).sum(0)
    share_HE = first_HE / max(1, t)
    mean_HE = probability_THE.sum(0) / max(1, t)
    balance = num_experts * (share_HE * mean_HE).sum(-1).mean()
    z = torch.logsumexp(logits_THE, dim=-1).square().sum() / max(1, t * heads)
    return Routed(out_THo, gates_THE, balance, z)


def _einsums(x_THi: Tensor, gates_THE: Tensor, weight_HEio: Tensor, bias_HEo: Tensor) -> Tensor:
    product_THEo = torch.einsum("thi,heio->theo", x_THi.double(), weight_HEio.double())
    hidden_THEo = F.gelu(product_THEo + bias_HEo.double())
    return torch.einsum("the,theo->tho", gates_THE.double(), hidden_THEo).to(x_THi.dtype)


def _all_experts(x_THi: Tensor, gates_THE: Tensor, weight_HEio: Tensor, bias_HEo: Tensor) -> Tensor:
    heads, num_experts, width, out_width = weight_HEio.shape
    weight_HiX = weight_HEio.transpose(1, 2).reshape(heads, width, num_experts * out_width)
    bias_H1X = bias_HEo.reshape(heads, 1, num_experts * out_width)
    chunk = max(1, tile_bytes(x_THi.device, _CHUNK_BYTES) // (4 * heads * num_experts * out_width))
    outs = []
    for x_tHi, gates_tHE in zip(torch.split(x_THi, chunk), torch.split(gates_THE, chunk), strict=True):
        hidden_HtX = F.gelu(torch.baddbmm(bias_H1X, x_tHi.transpose(0, 1), weight_HiX))
        hidden_HtEo = hidden_HtX.view(heads, -1, num_experts, out_width)
        gates_HtE1 = gates_tHE.transpose(0, 1).unsqueeze(3).to(hidden_HtEo.dtype)
        outs.append((gates_HtE1 * hidden_HtEo).sum(2).transpose(0, 1))  # a product of 1 x E rows is slower
    return torch.cat(outs)


def _chosen_experts(
    x_THi: Tensor, gates_THk: Tensor, chosen_THk: Tensor, weight_HEio: Tensor, bias_HEo: Tensor
) -> Tensor:
    """Groups are padded to the largest; with equal choices everywhere this costs as much as `dense`."""
    t, heads, chosen = chosen_THk.shape
    _, num_experts, width, out_width = weight_HEio.shape
    num_groups = heads * num_experts
    chosen_mask_THE = torch.zeros(t, heads, num_experts, dtype=torch.int64, device=x_THi.device)
    chosen_mask_THE.scatter_(-1, chosen_THk, 1)
    index_THE = chosen_mask_THE.cumsum(0) - 1  # index of a position within its group
    capacity = int(chosen_mask_THE.sum(0).max())
    group_THk = chosen_THk + num_experts * torch.arange(heads, device=x_THi.device)[:, None]
    slot_R = (group_THk * capacity + index_THE.gather(-1, chosen_THk)).flatten()

    # Slots are distinct, so these copies and their gradients never accumulate: runs are bit-identical.
    rows_Ri = x_THi.unsqueeze(2).expand(t, heads, chosen, width).reshape(-1, width)
    slots = rows_Ri.new_zeros(num_groups * capacity, width).index_copy(0, slot_R, rows_Ri)
    hidden_Gco = torch.baddbmm(
        bias_HEo.reshape(num_groups, 1, out_width),
        slots.view(num_groups, capacity, width),
        weight_HEio.reshape(num_groups, width, out_width),
    )
    hidden_THko = F.gelu(hidden_Gco).reshape(-1, out_width).index_select(0, slot_R)
    hidden_THko = hidden_THko.view(t, heads, chosen, out_width)
    return (gates_THk.to(hidden_THko.dtype).unsqueeze(-1) * hidden_THko).sum(2)
