"""The contrastive loss with in-batch negatives (InfoNCE; van den Oord et al. 2018, arXiv 1807.03748).

Shape letters: n pairs of vectors, d width.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from findrec.devices import copy_to


def info_nce(one_nd: Tensor, two_nd: Tensor, group_n: Tensor, temperature: float) -> Tensor:
    """Mean cross-entropy of finding `two_nd[i]` for `one_nd[i]` among all of `two_nd`, by the cosine.

    Pairs of the same group (such as one target item) are no negatives of each other: their logits are -inf.
    A logit of 0 instead, as in public code, would leave each of them in the sum as a negative.
    """
    with torch.autocast(one_nd.device.type, enabled=False):
        one_nd, two_nd = (F.normalize(x_nd.float(), dim=1) for x_nd in (one_nd, two_nd))
        logit_nn = one_nd @ two_nd.t() / temperature
        same_nn = group_n[:, None] == group_n
        logit_nn = logit_nn.masked_fill(same_nn.fill_diagonal_(False), -torch.inf)
        return F.cross_entropy(logit_nn, torch.arange(len(group_n), device=group_n.device))


def sample_rows(count: int, most: int, device: torch.device) -> Tensor | None:
    """Indices of `most` of `count` rows, drawn from torch's global generator; None for all of them."""
    return None if count <= most else copy_to(torch.randperm(count)[:most], device)
