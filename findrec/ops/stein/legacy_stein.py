"""The alignment term of FindRec's public code, for ablation only. It is not a Stein discrepancy.

Its errors, in the notation of `stein_discrepancy`, which has the correct formula:

* the term s(y).grad_x k has the wrong sign, and its counterpart s(x).grad_y k is missing;
* the trace term D/h^2 - r2/h^4 is negated. It then attracts every x to every y, more strongly for smaller h:
  with zero scores a pair is worth about -k D/h^2, so a collapsed sample scores best;
* x and y come from two samples, each with a score of its own. A Stein discrepancy has ONE density. As the
  scores are trained by the term they enter, k s(x).s(y) falls without bound (s(y) = -c s(x), c growing).

So it is not zero for equal samples, has no lower bound, and does not measure the distance of two samples.

Shape letters: n and m rows of the samples, D width.
"""

from __future__ import annotations

import torch
from torch import Tensor

from findrec.ops.stein.stein_discrepancy import median_bandwidth2

BANDWIDTHS = (0.1, 10.0)  # the public code's bounds of its adaptive bandwidth


def legacy_stein(
    Z_nD: Tensor, Z_score_nD: Tensor, A_mD: Tensor, A_score_mD: Tensor, *, bandwidth: float | None = None
) -> Tensor:
    """Mean over x in Z, y in A of `k [s(x).s(y) + (x-y).s(y)/h^2 + r2/h^4 - D/h^2]`, k RBF; a scalar.

    `bandwidth` is h; None: the square root of `median_bandwidth2`, kept within `BANDWIDTHS`. Gradients reach
    all four tensors. Zero when a sample is empty. Raises `ValueError` for shapes that do not fit.
    """
    shapes = [tuple(x.shape) for x in (Z_nD, Z_score_nD, A_mD, A_score_mD)]
    if Z_nD.ndim != 2 or shapes[0] != shapes[1] or shapes[2] != shapes[3] or Z_nD.shape[1:] != A_mD.shape[1:]:
        raise ValueError(f"expected two samples [n, D] and [m, D], each before its score, not {shapes}")
    n, m, width = len(Z_nD), len(A_mD), Z_nD.shape[1]
    if n == 0 or m == 0:
        return (Z_nD.sum() + A_mD.sum()) * 0.0
    if bandwidth is not None:
        h2 = torch.as_tensor(bandwidth, dtype=Z_nD.dtype, device=Z_nD.device).square()
    else:
        h2 = median_bandwidth2(Z_nD, A_mD).sqrt().clamp(*BANDWIDTHS).square()
    r2_nm = Z_nD.square().sum(1)[:, None] + A_mD.square().sum(1) - 2 * Z_nD @ A_mD.t()
    r2_nm = r2_nm.clamp(min=0)
    toward_nm = Z_nD @ A_score_mD.t() - (A_mD * A_score_mD).sum(1)  # (x - y).s(y)
    u_nm = Z_score_nD @ A_score_mD.t() + (toward_nm + r2_nm / h2 - width) / h2
    return (torch.exp(-r2_nm / (2 * h2)) * u_nm).mean()
