"""What trains the interests beside the loss of the catalogue, and what the views learn from each other.

Shape letters: n events, K interests, T target positions, d width.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F


def allocation_divergence(one_nK: Tensor, two_nK: Tensor, valid_n: Tensor) -> Tensor:
    """Mean over valid events of the symmetric Kullback-Leibler divergence of two allocations to interests.

    `(KL(p, q) + KL(q, p)) / 2` of the softmax of the logits `[n, K]`; 0 without valid events.
    """
    with torch.autocast(one_nK.device.type, enabled=False):
        one_nK, two_nK = one_nK.float().log_softmax(-1), two_nK.float().log_softmax(-1)
        divergence_n = ((one_nK.exp() - two_nK.exp()) * (one_nK - two_nK)).sum(-1) / 2
        return (divergence_n * valid_n).sum() / valid_n.sum().clamp(min=1)


def maximum_loss(interest_nKd: Tensor, wanted_nd: Tensor, target_n: Tensor) -> Tensor:
    """Cross-entropy of the targets `[n]` among the distinct ones, by the largest of the K inner products.

    This is the score of the ranking. The loss over the catalogue sees only what is read out for the target,
    so without this one an interest that the user does not have could score any item first. An item is one
    class, however often it is a target: otherwise frequent items would be negatives more often.
    """
    with torch.autocast(interest_nKd.device.type, enabled=False):
        distinct_m, class_n = torch.unique(target_n, return_inverse=True)
        row_n = torch.arange(len(target_n), device=target_n.device)
        first_m = torch.full_like(distinct_m, len(target_n)).scatter_reduce_(0, class_n, row_n, "amin")
        score_nm = torch.einsum("nkd,md->nmk", interest_nKd.float(), wanted_nd[first_m].float()).amax(-1)
        return F.cross_entropy(score_nm, class_n)


def read_out(interest_TKd: Tensor, wanted_Td: Tensor) -> Tensor:
    """One vector `[T, d]` for the target: interests weighted by softmax of their scores of the target.

    The weights are the posterior of which interest the target is of, and are not differentiated
    (label-aware attention; Li et al. 2019, arXiv 1904.08030).
    """
    score_TK = torch.einsum("tkd,td->tk", interest_TKd.detach().float(), wanted_Td.detach().float())
    weight_TK = F.softmax(score_TK, dim=1).to(interest_TKd.dtype)
    return torch.einsum("tk,tkd->td", weight_TK, interest_TKd)
