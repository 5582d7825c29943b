"""The losses of the fusion stage, over the items of a microbatch.

Shape letters: n items, f width.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor
from torch.nn import functional as F

from findrec.ops.stein.stein_discrepancy import mmd

PROJECTIONS = 64  # random directions of the sliced Wasserstein distance
_EQUAL = 1 - 1e-5  # cosine above which two anchors are the same text


def contrast(
    z_nf: Tensor, a_nf: Tensor, temperature: float, bias_nn: Tensor, *, symmetric: bool = True
) -> Tensor:
    """InfoNCE (van den Oord et al. 2018): row i of `z_nf` against all rows of `a_nf`, of which row i is true.

        mean_i  -log  exp(cos(z_i, a_i) / tau + b_ii) / sum_j exp(cos(z_i, a_j) / tau + b_ij)

    `bias_nn` weights negatives by exp(b_ij); -inf leaves one out. With `symmetric`, the mean with the same
    loss of `a_nf` against `z_nf`. Zero for fewer than two rows.
    """
    if len(z_nf) < 2:
        return (z_nf.sum() + a_nf.sum()) * 0.0
    logit_nn = F.normalize(z_nf, dim=1) @ F.normalize(a_nf, dim=1).t() / temperature + bias_nn
    true_n = torch.arange(len(z_nf), device=z_nf.device)
    loss = F.cross_entropy(logit_nn, true_n)
    return (loss + F.cross_entropy(logit_nn.t(), true_n)) / 2 if symmetric else loss


def negative_bias(unit_nM: Tensor, genre_n: Tensor, same_genre: float) -> Tensor:
    """`[n, n]` for `contrast`: items with equal anchors are no negatives, those of the genre are weighted.

    `unit_nM` are the anchors as unit vectors, `genre_n` int64 with 0 for unknown.
    """
    same_nn = (genre_n[:, None] == genre_n) & (genre_n > 0)
    bias_nn = torch.where(same_nn, math.log(same_genre) if same_genre else -math.inf, 0.0)
    bias_nn = bias_nn.masked_fill(unit_nM @ unit_nM.t() > _EQUAL, -math.inf)
    return bias_nn.fill_diagonal_(0.0)


def pair_bias(item_n: Tensor, partner_n: Tensor, count_n: Tensor) -> Tensor:
    """`[n, n]` for items against partners drawn from events: logQ correction (Yi et al. 2019).

    Partners occur in a microbatch in proportion to their number of events `count_n`, which is divided out.
    Equal partners, and partners that are the item itself, are no negatives.
    """
    bias_nn = -(count_n.float().clamp(min=1).log()).expand(len(item_n), -1)
    false_nn = (partner_n[:, None] == partner_n) | (item_n[:, None] == partner_n)
    eye_nn = torch.eye(len(item_n), dtype=torch.bool, device=item_n.device)
    return bias_nn.masked_fill(false_nn & ~eye_nn, -math.inf)


def structure(unit_nM: Tensor, z_nf: Tensor, temperature: float) -> Tensor:
    """KL(P || Q) of similarities to other items: P of the anchors (unit vectors), Q of the vectors `z_nf`.

    Rows of P and Q are softmaxes of cosines / temperature, without the item itself (relational knowledge
    distillation). Zero for fewer than three rows.
    """
    if len(z_nf) < 3:
        return z_nf.sum() * 0.0
    eye_nn = torch.eye(len(z_nf), dtype=torch.bool, device=z_nf.device)
    u_nf = F.normalize(z_nf, dim=1)

    def log_similarity(cosine_nn: Tensor) -> Tensor:
        # Not -inf: its product with a probability of zero would be NaN.
        return (cosine_nn / temperature).masked_fill(eye_nn, -1e4).log_softmax(1)

    log_p_nn, log_q_nn = log_similarity(unit_nM @ unit_nM.t()), log_similarity(u_nf @ u_nf.t())
    return (log_p_nn.exp() * (log_p_nn - log_q_nn)).sum(1).mean()


def anti_collapse(z_nf: Tensor, covariance: float) -> Tensor:
    """Variance and covariance terms of VICReg (Bardes, Ponce & LeCun 2022, equations 1 to 4).

        mean_j max(0, 1 - std_j)  +  covariance / f  sum_{j != k} C_jk^2

    Zero for fewer than two rows.
    """
    n, width = z_nf.shape
    if n < 2:
        return z_nf.sum() * 0.0
    centred_nf = z_nf - z_nf.mean(0)
    std_f = (centred_nf.square().sum(0) / (n - 1) + 1e-4).sqrt()
    covariance_ff = centred_nf.t() @ centred_nf / (n - 1)
    off_diagonal = covariance_ff.square().sum() - covariance_ff.diagonal().square().sum()
    return F.relu(1 - std_f).mean() + covariance * off_diagonal / width


def sliced_wasserstein(z_nf: Tensor) -> Tensor:
    """Squared 2-Wasserstein distance to N(0, 1), mean over random directions.

    The sorted projections are compared with the quantiles of N(0, 1) at (i - 1/2) / n. Zero without rows.
    """
    n, width = z_nf.shape
    if n < 2:
        return z_nf.sum() * 0.0
    direction_fP = F.normalize(torch.randn(width, PROJECTIONS), dim=0).to(z_nf)
    sorted_nP = (z_nf @ direction_fP).sort(dim=0).values
    level_n = (torch.arange(n, dtype=torch.float64) + 0.5) / n
    quantile_n = torch.special.ndtri(level_n).to(z_nf)
    distance: Tensor = (sorted_nP - quantile_n[:, None]).square().mean()
    return distance


def uniformity(z_nf: Tensor) -> Tensor:
    """Log of the mean of exp(-2 |u_i - u_j|^2) over pairs of unit vectors (Wang & Isola 2020)."""
    if len(z_nf) < 2:
        return z_nf.sum() * 0.0
    u_nf = F.normalize(z_nf, dim=1)
    cosine_nn = u_nf @ u_nf.t()
    eye_nn = torch.eye(len(u_nf), dtype=torch.bool, device=u_nf.device)
    exponent_nn = (-4 * (1 - cosine_nn)).masked_fill(eye_nn, -math.inf)  # |u_i - u_j|^2 = 2 - 2 cos
    mean: Tensor = exponent_nn.flatten().logsumexp(0) - math.log(len(u_nf) * (len(u_nf) - 1))
    return mean


def distribution(z_nf: Tensor, distance: str) -> Tensor:
    """The distance of the vectors from a normal distribution, by its name in the configuration."""
    if distance == "sliced":
        return sliced_wasserstein(z_nf)
    if distance == "mmd":
        return mmd(z_nf, torch.randn(z_nf.shape).to(z_nf))
    return uniformity(z_nf)
