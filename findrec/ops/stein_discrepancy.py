"""How far a sample is from a reference distribution: kernelised Stein discrepancy, and MMD as its control.

The Stein discrepancy (Liu, Lee & Jordan 2016; Chwialkowski, Strathmann & Gretton 2016) compares the sample Z
with ONE density, through that density's score s = grad log p, here taken from a reference sample A without
training anything. With x, y two rows of Z, k their kernel, r2 = |x - y|^2, the Langevin-Stein kernel is

    u(x, y) = k s(x).s(y) + s(x).grad_y k + s(y).grad_x k + trace(grad_x grad_y k)
    RBF:  k = exp(-r2 / 2h^2)         u = k [ s.s' + (x-y).(s-s')/h^2 + D/h^2 - r2/h^4 ]
    IMQ:  k = q^-1/2, q = 1 + r2/h^2  u = k s.s' + q^-3/2 [ (x-y).(s-s') + D ]/h^2 - 3 q^-5/2 r2/h^4

and KSD^2 is its mean over pairs of different rows (unbiased: it may dip below 0 near equality). Everything
is matrix products of n x D blocks; memory is a few n x n buffers. Work in float32, never autocast.

Shape letters: n rows of the sample, m rows of the reference, D width.
"""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

Score = Literal["gaussian", "kde"]
Kernel = Literal["rbf", "imq"]
_BANDWIDTH_ROWS = 256  # of each sample: the median needs no more


def stein_discrepancy(
    Z_nD: Tensor,
    A_mD: Tensor,
    *,
    score: Score = "gaussian",
    kernel: Kernel = "rbf",
    bandwidth2: Tensor | float | None = None,
) -> Tensor:
    """Squared Stein discrepancy of sample `Z_nD` from the law of `A_mD`, times tau^2 / D; a scalar.

    tau^2 is the mean variance of the reference over dimensions; the factor makes the value free of units and
    of a size that does not grow with D. `score="gaussian"` is that of a normal law with shrunk covariance,
    `"kde"` that of a kernel density estimate with the reference's own spread. `bandwidth2` (h^2) is the
    median heuristic over both samples unless given. Gradients reach `Z_nD` only: the reference, its score
    and the bandwidth are constants. Zero for fewer than two rows of either. Raises `ValueError` for unknown
    names or widths that differ.
    """
    _check(Z_nD, A_mD)
    if len(Z_nD) < 2 or len(A_mD) < 2:
        return Z_nD.sum() * 0.0
    reference_mD = A_mD.detach()
    n, width = Z_nD.shape
    tau2 = reference_mD.var(0, correction=0).mean().clamp(min=1e-12)
    if score == "gaussian":
        S_nD = gaussian_score(Z_nD, reference_mD)
    elif score == "kde":
        S_nD = kde_score(Z_nD, reference_mD)
    else:
        raise ValueError(f"score {score!r} is unknown: 'gaussian' or 'kde'")
    h2 = median_bandwidth2(Z_nD, reference_mD) if bandwidth2 is None else bandwidth2
    cross_nn = Z_nD @ S_nD.t()
    own_n = cross_nn.diagonal()
    shift_nn = own_n[:, None] + own_n[None] - cross_nn - cross_nn.t()  # (x - y).(s - s')
    score_nn = S_nD @ S_nD.t()
    r2_nn = _squared_distances(Z_nD, Z_nD)
    if kernel == "rbf":
        k_nn = torch.exp(-r2_nn / (2 * h2))
        u_nn = k_nn * (score_nn + (shift_nn + width - r2_nn / h2) / h2)
    elif kernel == "imq":
        q_nn = 1 + r2_nn / h2
        k_nn = q_nn.rsqrt()
        u_nn = k_nn * (score_nn + ((shift_nn + width) - 3 * r2_nn / (h2 * q_nn)) / (h2 * q_nn))
    else:
        raise ValueError(f"kernel {kernel!r} is unknown: 'rbf' or 'imq'")
    total = u_nn.sum() - u_nn.diagonal().sum()
    return total * (tau2 / width) / (n * (n - 1))


def mmd(Z_nD: Tensor, A_mD: Tensor, *, bandwidth2: Tensor | float | None = None) -> Tensor:
    """Squared maximum mean discrepancy with an RBF kernel, unbiased (Gretton et al. 2012, lemma 6); a scalar.

    The control for `stein_discrepancy`: the same kernel and bandwidth, no score. Gradients reach `Z_nD` only.
    """
    _check(Z_nD, A_mD)
    n, m = len(Z_nD), len(A_mD)
    if n < 2 or m < 2:
        return Z_nD.sum() * 0.0
    reference_mD = A_mD.detach()
    h2 = median_bandwidth2(Z_nD, reference_mD) if bandwidth2 is None else bandwidth2

    def mean_kernel(x: Tensor, y: Tensor, pairs: int, left_out: int) -> Tensor:
        return (torch.exp(-_squared_distances(x, y) / (2 * h2)).sum() - left_out) / pairs

    within_Z = mean_kernel(Z_nD, Z_nD, n * (n - 1), n)  # k(x, x) = 1
    within_A = mean_kernel(reference_mD, reference_mD, m * (m - 1), m)
    return within_Z + within_A - 2 * mean_kernel(Z_nD, reference_mD, n * m, 0)


def gaussian_score(Z_nD: Tensor, A_mD: Tensor) -> Tensor:
    """Score at Z of a normal law with the mean of A and its covariance shrunk towards a multiple of I.

    The shrinkage is the oracle approximating one (Chen, Wiesel, Eldar & Hero 2010, eq. 23).
    """
    m, width = A_mD.shape
    mean_D = A_mD.mean(0)
    centred_mD = A_mD - mean_D
    cov_DD = centred_mD.t() @ centred_mD / m
    trace, trace_of_square = cov_DD.diagonal().sum(), cov_DD.square().sum()
    above = (1 - 2 / width) * trace_of_square + trace**2
    below = (m + 1 - 2 / width) * (trace_of_square - trace**2 / width)
    rho = (above / below.clamp(min=1e-12)).clamp(max=1.0)
    eye_DD = torch.eye(width, dtype=A_mD.dtype, device=A_mD.device)
    # The last term keeps a reference without any spread (all rows equal) invertible.
    shrunk_DD = (1 - rho) * cov_DD + (rho * trace / width + 1e-6) * eye_DD
    precision_DD = torch.cholesky_inverse(torch.linalg.cholesky(shrunk_DD))
    score_nD: Tensor = (mean_D - Z_nD) @ precision_DD
    return score_nD


def kde_score(Z_nD: Tensor, A_mD: Tensor) -> Tensor:
    """Score at Z of a mixture of normals around A that is as wide as A itself.

    A plain kernel estimate is wider than its sample by the kernel's variance c v. Here the centres are first
    drawn towards the mean by sqrt(1 - c), so the mixture keeps the mean variance v of A. c is the square of
    Silverman's factor, (4 / ((D + 2) m))^(2 / (D + 4)).
    """
    m, width = A_mD.shape
    mean_D = A_mD.mean(0)
    variance = A_mD.var(0, correction=0).mean().clamp(min=1e-12)
    c = min(1.0, (4 / ((width + 2) * m)) ** (2 / (width + 4)))
    centre_mD = mean_D + (1 - c) ** 0.5 * (A_mD - mean_D)
    weight_nm = torch.softmax(-_squared_distances(Z_nD, centre_mD) / (2 * c * variance), dim=1)
    score_nD: Tensor = (weight_nm @ centre_mD - Z_nD) / (c * variance)
    return score_nD


@torch.no_grad()
def median_bandwidth2(Z_nD: Tensor, A_mD: Tensor) -> Tensor:
    """h^2 = half the median squared distance within the pooled samples (first rows of each).

    Pooled, because the median of Z alone would shrink with a collapsing Z and hide the collapse.
    """
    pooled = torch.cat([Z_nD[:_BANDWIDTH_ROWS], A_mD[:_BANDWIDTH_ROWS]])
    n = len(pooled)
    upper = torch.triu_indices(n, n, offset=1, device=pooled.device)
    median = _squared_distances(pooled, pooled)[upper[0], upper[1]].median()
    return (median / 2).clamp(min=1e-12)


def _squared_distances(x: Tensor, y: Tensor) -> Tensor:
    r2 = x.square().sum(1)[:, None] + y.square().sum(1)[None] - 2 * (x @ y.t())
    return r2.clamp(min=0)


def _check(Z_nD: Tensor, A_mD: Tensor) -> None:
    if Z_nD.ndim != 2 or A_mD.ndim != 2 or Z_nD.shape[1] != A_mD.shape[1]:
        raise ValueError(
            f"two samples [n, D] and [m, D] of one width are compared, not {tuple(Z_nD.shape)} "
            f"and {tuple(A_mD.shape)}"
        )
