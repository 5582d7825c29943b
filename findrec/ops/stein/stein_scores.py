"""Scores (gradients of a log density) of a reference sample, estimated in closed form without training.

Shape letters: n points where the score is evaluated, m rows of the reference, D width.
"""

from __future__ import annotations

import torch
from torch import Tensor


def gaussian_score(Z_nD: Tensor, A_mD: Tensor) -> Tensor:
    """Score at `Z_nD` of a normal law: mean of `A_mD`, its covariance shrunk towards a multiple of I.

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
    # The last term keeps the covariance of a constant reference (all rows equal) invertible.
    shrunk_DD = (1 - rho) * cov_DD + (rho * trace / width + 1e-6) * eye_DD
    # A check waits for a GPU. It fails for numbers that are not finite, and then neither is the loss.
    factor_DD = torch.linalg.cholesky_ex(shrunk_DD, check_errors=A_mD.device.type == "cpu").L
    precision_DD = torch.cholesky_inverse(factor_DD)
    score_nD: Tensor = (mean_D - Z_nD) @ precision_DD
    return score_nD


def kde_score(Z_nD: Tensor, A_mD: Tensor) -> Tensor:
    """Score at `Z_nD` of a mixture of normals around `A_mD` that is as wide as `A_mD` itself.

    A plain kernel estimate is wider than its sample by the kernel's variance c v. Here the centres are first
    drawn towards the mean by sqrt(1 - c), so the mixture keeps the mean variance v of A. c is the square of
    Silverman's factor, (4 / ((D + 2) m))^(2 / (D + 4)).
    """
    m, width = A_mD.shape
    mean_D = A_mD.mean(0)
    variance = A_mD.var(0, correction=0).mean().clamp(min=1e-12)
    c = min(1.0, (4 / ((width + 2) * m)) ** (2 / (width + 4)))
    spread = c * variance
    # Centred at the mean: smaller numbers lose less precision in the logits.
    x_nD, centre_mD = Z_nD - mean_D, (1 - c) ** 0.5 * (A_mD - mean_D)
    # -|x - centre|^2 / 2 without |x|^2, which cancels in the softmax of a row.
    logits_nm = torch.addmm(centre_mD.square().sum(1) / (-2 * spread), x_nD / spread, centre_mD.t())
    score_nD: Tensor = (torch.softmax(logits_nm, dim=1) @ centre_mD - x_nD) / spread
    return score_nD
