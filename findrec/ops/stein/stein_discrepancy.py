"""Distance of a sample from a reference distribution: kernelised Stein discrepancy, and MMD as a control.

The Stein discrepancy (Liu, Lee & Jordan 2016; Chwialkowski, Strathmann & Gretton 2016) compares the sample Z
with ONE density, through that density's score s = grad log p, here taken from a reference sample A without
training anything (`stein_scores`). With x, y two rows of Z, k their kernel, r2 = |x - y|^2, the
Langevin-Stein kernel is

    u(x, y) = k s(x).s(y) + s(x).grad_y k + s(y).grad_x k + trace(grad_x grad_y k)
    RBF:  k = exp(-r2 / 2h^2)         u = k [ s.s' + (x-y).(s-s')/h^2 + D/h^2 - r2/h^4 ]
    IMQ:  k = q^-1/2, q = 1 + r2/h^2  u = k s.s' + q^-3/2 [ (x-y).(s-s') + D ]/h^2 - 3 q^-5/2 r2/h^4

and KSD^2 is its mean over pairs of different rows (unbiased: it may be negative near equality). All work is
matrix products of n x D blocks, in float32 or float64 even under autocast.

| impl        | what                                                                    | memory         |
|-------------|-------------------------------------------------------------------------|----------------|
| `reference` | the formulas above on whole n x n matrices, under autograd              | a dozen n x n  |
| `tiled`     | value and hand-derived gradient, one pass over row tiles (`_pair_sums`) | a few tiles    |

`auto` is `tiled`; a tile has 4 MiB in float32. The score "kde" adds a few n x m matrices. To autograd
the gradient of `tiled` is a constant: take `reference` for second derivatives.
Shape letters: n rows of the sample, m rows of the reference, D width.
"""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

from findrec.devices import is_cpu
from findrec.ops.stein._pair_sums import langevin_sum, rbf_sum
from findrec.ops.stein.stein_scores import gaussian_score, kde_score

Score = Literal["gaussian", "kde"]
Kernel = Literal["rbf", "imq"]
Impl = Literal["auto", "reference", "tiled"]
_BANDWIDTH_ROWS = 256  # rows of each sample that the median is estimated from


def stein_discrepancy(
    Z_nD: Tensor,
    A_mD: Tensor,
    *,
    score: Score = "gaussian",
    kernel: Kernel = "rbf",
    bandwidth2: Tensor | float | None = None,
    impl: Impl = "auto",
) -> Tensor:
    """Squared Stein discrepancy of sample `Z_nD` from the law of `A_mD`, times tau^2 / D; a scalar.

    tau^2 is the mean variance of the reference over dimensions; the factor makes the value
    dimensionless and independent of D. `score="gaussian"` is that of a normal law with shrunk covariance,
    `"kde"` that of a kernel density estimate with the reference's own spread. `bandwidth2` (h^2) is the
    median heuristic over both samples unless given. Gradients reach `Z_nD` only: the reference, its score
    and the bandwidth are constants. Zero for fewer than two rows of either. Half-precision samples are
    compared in float32. Raises `ValueError` for unknown names or widths that differ.
    """
    _check(Z_nD, A_mD, impl)
    if score not in ("gaussian", "kde"):
        raise ValueError(f"score {score!r} is unknown: 'gaussian' or 'kde'")
    if kernel not in ("rbf", "imq"):
        raise ValueError(f"kernel {kernel!r} is unknown: 'rbf' or 'imq'")
    with torch.autocast(Z_nD.device.type, enabled=False):
        Z_nD, reference_mD = _in_one_precision(Z_nD, A_mD)
        n, width = Z_nD.shape
        if n < 2 or len(reference_mD) < 2:
            return Z_nD.sum() * 0.0
        tau2 = reference_mD.var(0, correction=0).mean().clamp(min=1e-12)
        S_nD = (gaussian_score if score == "gaussian" else kde_score)(Z_nD, reference_mD)
        h2 = _bandwidth2(Z_nD, reference_mD, bandwidth2)
        if impl == "reference":
            total = _dense_langevin_sum(Z_nD, S_nD, h2, kernel)
        else:
            # In units of h; u is invariant to shifts, and distances are more precise near 0.
            h = h2.sqrt()
            total = langevin_sum((Z_nD - Z_nD.detach().mean(0)) / h, S_nD * h, kernel) / h2
        return total * (tau2 / width) / (n * (n - 1))


def _dense_langevin_sum(Z_nD: Tensor, S_nD: Tensor, h2: Tensor, kernel: Kernel) -> Tensor:
    width = Z_nD.shape[1]
    cross_nn = Z_nD @ S_nD.t()
    own_n = cross_nn.diagonal()
    shift_nn = own_n[:, None] + own_n[None] - cross_nn - cross_nn.t()  # (x - y).(s - s')
    score_nn = S_nD @ S_nD.t()
    r2_nn = _squared_distances(Z_nD, Z_nD)
    if kernel == "rbf":
        u_nn = torch.exp(-r2_nn / (2 * h2)) * (score_nn + (shift_nn + width - r2_nn / h2) / h2)
    else:
        q_nn = 1 + r2_nn / h2
        u_nn = q_nn.rsqrt() * (score_nn + ((shift_nn + width) - 3 * r2_nn / (h2 * q_nn)) / (h2 * q_nn))
    return u_nn.sum() - u_nn.diagonal().sum()


def mmd(
    Z_nD: Tensor, A_mD: Tensor, *, bandwidth2: Tensor | float | None = None, impl: Impl = "auto"
) -> Tensor:
    """Squared maximum mean discrepancy with an RBF kernel, unbiased (Gretton et al. 2012, lemma 6); a scalar.

    The control for `stein_discrepancy`: the same kernel, bandwidth and precision, no score. Gradients reach
    `Z_nD` only. Zero for fewer than two rows of either. Raises `ValueError` as `stein_discrepancy` does.
    """
    _check(Z_nD, A_mD, impl)
    with torch.autocast(Z_nD.device.type, enabled=False):
        Z_nD, reference_mD = _in_one_precision(Z_nD, A_mD)
        n, m = len(Z_nD), len(reference_mD)
        if n < 2 or m < 2:
            return Z_nD.sum() * 0.0
        h2 = _bandwidth2(Z_nD, reference_mD, bandwidth2)
        middle_D, h = reference_mD.mean(0), h2.sqrt()
        X_nD, Y_mD = (Z_nD - middle_D) / h, (reference_mD - middle_D) / h
        kernel_sum = _dense_rbf_sum if impl == "reference" else rbf_sum
        within_Z = (kernel_sum(X_nD, X_nD) - n) / (n * (n - 1))  # k(x, x) = 1
        within_A = (kernel_sum(Y_mD, Y_mD) - m) / (m * (m - 1))
        return within_Z + within_A - 2 * kernel_sum(X_nD, Y_mD) / (n * m)


def _dense_rbf_sum(X_nD: Tensor, Y_mD: Tensor) -> Tensor:
    return torch.exp(_squared_distances(X_nD, Y_mD) / -2).sum()


@torch.no_grad()
def median_bandwidth2(Z_nD: Tensor, A_mD: Tensor) -> Tensor:
    """h^2 = half the median squared distance within the pooled samples (first rows of each).

    Pooled, because the median of Z alone would shrink with a collapsing Z and hide the collapse.
    """
    pooled = torch.cat([Z_nD[:_BANDWIDTH_ROWS], A_mD[:_BANDWIDTH_ROWS]])
    if not is_cpu(pooled.device):  # one kernel for the distances
        return torch.nn.functional.pdist(pooled).median().square().div(2).clamp(min=1e-12)
    n = len(pooled)
    upper = torch.triu_indices(n, n, offset=1, device=pooled.device)
    median = _squared_distances(pooled, pooled)[upper[0], upper[1]].median()
    return (median / 2).clamp(min=1e-12)


def _bandwidth2(Z_nD: Tensor, A_mD: Tensor, bandwidth2: Tensor | float | None) -> Tensor:
    if bandwidth2 is None:
        return median_bandwidth2(Z_nD, A_mD)
    return torch.as_tensor(bandwidth2, dtype=Z_nD.dtype, device=Z_nD.device).detach()


def _in_one_precision(Z_nD: Tensor, A_mD: Tensor) -> tuple[Tensor, Tensor]:
    """Both in float64 when the sample is, else in float32; the reference without gradient."""
    dtype = torch.float64 if Z_nD.dtype == torch.float64 else torch.float32
    return Z_nD.to(dtype), A_mD.detach().to(dtype)


def _squared_distances(x: Tensor, y: Tensor) -> Tensor:
    r2 = x.square().sum(1)[:, None] + y.square().sum(1)[None] - 2 * (x @ y.t())
    return r2.clamp(min=0)


def _check(Z_nD: Tensor, A_mD: Tensor, impl: str) -> None:
    if Z_nD.ndim != 2 or A_mD.ndim != 2 or Z_nD.shape[1] != A_mD.shape[1]:
        raise ValueError(
            f"two samples [n, D] and [m, D] of one width are compared, not {tuple(Z_nD.shape)} "
            f"and {tuple(A_mD.shape)}"
        )
    if impl not in ("auto", "reference", "tiled"):
        raise ValueError(f"implementation {impl!r} is unknown: 'auto', 'reference' or 'tiled'")
