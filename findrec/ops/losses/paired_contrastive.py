"""A contrastive loss between each item's modal latent and the same item's ID vector.

A discrepancy compares two distributions and is invariant to permuting the rows of either, so it cannot learn
which content belongs to which item; this loss can. InfoNCE (van den Oord et al. 2018, eq. 4) in both
directions, as in CLIP (Radford et al. 2021, fig. 3).

Shape letters: n items, D width.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F


def paired_contrastive(
    Z_nD: Tensor, A_nD: Tensor, *, temperature: float = 0.1, group_n: Tensor | None = None
) -> Tensor:
    """Mean over items, in both directions, of `-log softmax(cosine / temperature)` at the item; a scalar.

    Row i of `Z_nD` belongs to row i of `A_nD`; detach `A_nD` to move the latents only. Rows that share a
    number in the int64 `group_n` (the same item twice, the same picture on two items: `features.unique(dim=0,
    return_inverse=True)[1]`) are not negatives of each other. About ln n before training, 0 at best.
    In float32 even under autocast, or in float64. Zero for fewer than two rows.
    Raises `ValueError` for shapes that do not fit or a temperature that is not positive.
    """
    if Z_nD.ndim != 2 or Z_nD.shape != A_nD.shape:
        raise ValueError(
            f"pairs of rows [n, D] are compared, not {tuple(Z_nD.shape)} and {tuple(A_nD.shape)}"
        )
    n = len(Z_nD)
    if group_n is not None and group_n.shape != (n,):
        raise ValueError(f"group_n has one number for each of the {n} rows, not shape {tuple(group_n.shape)}")
    if temperature <= 0:
        raise ValueError(
            f"temperature={temperature} must be above 0: cosines are divided by it (0.05 to 0.2)"
        )
    dtype = torch.float64 if Z_nD.dtype == torch.float64 else torch.float32
    with torch.autocast(Z_nD.device.type, enabled=False):
        Z_nD, A_nD = Z_nD.to(dtype), A_nD.to(dtype)
        if n < 2:
            return (Z_nD.sum() + A_nD.sum()) * 0.0
        logits_nn = F.normalize(Z_nD, dim=1) @ F.normalize(A_nD, dim=1).t() / temperature
        if group_n is not None:
            same_group_nn = group_n[:, None] == group_n
            logits_nn = logits_nn.masked_fill(same_group_nn.fill_diagonal_(False), -torch.inf)
        label_n = torch.arange(n, device=Z_nD.device)
        return (F.cross_entropy(logits_nn, label_n) + F.cross_entropy(logits_nn.t(), label_n)) / 2
