"""Pairwise losses of user-item edges with negatives.

Shape letters: n edges, N negatives of an edge.
"""

from __future__ import annotations

from torch import Tensor
from torch.nn import functional as F


def bpr(score_n: Tensor, negative_nN: Tensor) -> Tensor:
    """`[n]` Bayesian personalised ranking: the mean over negatives of `-ln sigmoid(positive - negative)`.

    Rendle et al. 2009, arXiv 1205.2618, with N negatives for each positive instead of one.
    """
    return F.softplus(negative_nN - score_n[:, None]).mean(1)


def squared_norms(user_nd: Tensor, item_nd: Tensor, negative_nNd: Tensor) -> Tensor:
    """`[n]` half the squared norm of the rows of each edge, of its negatives the mean; for an l2 penalty."""
    negative_nN = negative_nNd.square().sum(2)
    return 0.5 * (user_nd.square().sum(1) + item_nd.square().sum(1) + negative_nN.mean(1))
