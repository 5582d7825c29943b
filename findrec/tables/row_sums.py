"""Sums over rows that need another form on a GPU: in a fixed order, and without a wait of the host."""

from __future__ import annotations

import torch
from torch import Tensor

from findrec.devices import is_cpu


def add_rows_(total_nd: Tensor, index_p: Tensor, values_pd: Tensor) -> Tensor:
    """Add row `i` of `values_pd` to row `index_p[i]` of `total_nd`, in place; indices may repeat.

    Values of equal indices are added in their order, so that equal inputs give equal bits on every worker.
    On a GPU `index_add_` adds in the order in which threads happen to arrive, while `index_put_` sorts the
    indices first (see `torch.use_deterministic_algorithms`).
    """
    if is_cpu(values_pd.device):
        return total_nd.index_add_(0, index_p, values_pd)
    return total_nd.index_put_((index_p,), values_pd, accumulate=True)


def add_some_rows_(
    total_nd: Tensor, index_p: Tensor, values_pd: Tensor, is_added_p: Tensor, alpha: float
) -> Tensor:
    """`add_rows_` of `alpha * values_pd`, of the rows for which `is_added_p` is true."""
    if is_cpu(values_pd.device):
        return total_nd.index_add_(0, index_p[is_added_p], values_pd[is_added_p], alpha=alpha)
    # For the size of a boolean index the host would wait. So the other rows take part with zeros, each added
    # to another row, as values of one row are added one after the other.
    spread_p = torch.arange(len(index_p), device=index_p.device) % len(total_nd)
    index_p = torch.where(is_added_p, index_p, spread_p)
    return add_rows_(total_nd, index_p, values_pd * (is_added_p * alpha)[:, None])
