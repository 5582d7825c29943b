"""The one optimizer of item tables, however their rows are placed: AdamW (Loshchilov & Hutter 2019)."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.optim.adamw import adamw

from findrec.config import OptimConfig


def adamw_rows(
    weight: Tensor,
    grad: Tensor,
    exp_avg: Tensor,
    exp_avg_sq: Tensor,
    *,
    steps: int,
    lr: float,
    norm: float,
    optim: OptimConfig,
) -> None:
    """Update rows `[n, d]` in place after `steps` earlier updates, then set `grad` to zero.

    `norm` is that of the whole table's gradient, on all workers: it is clipped to `optim.clip_table` by it.
    """
    if 0 < optim.clip_table < norm:
        grad.mul_(optim.clip_table / norm)
    beta1, beta2 = optim.betas
    adamw(
        *([weight], [grad], [exp_avg], [exp_avg_sq], []),
        [torch.tensor(float(steps), device=grad.device)],
        fused=True,  # one pass over the table, where its operations one by one make ten
        amsgrad=False,
        beta1=beta1,
        beta2=beta2,
        lr=lr,
        weight_decay=optim.weight_decay,
        eps=1e-8,
        maximize=False,
    )
    grad.zero_()
