"""Each loss of the fusion stage against a plain definition."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from findrec.models.mufasa.losses import (
    anti_collapse,
    contrast,
    distribution,
    negative_bias,
    pair_bias,
    sliced_wasserstein,
    structure,
    uniformity,
)

N, WIDTH = 7, 5


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)


def cosine(a: Tensor, b: Tensor) -> float:
    return float(a @ b / (a.norm() * b.norm()))


@pytest.mark.parametrize("symmetric", [False, True])
def test_contrast_is_the_mean_log_share_of_the_true_row(symmetric: bool) -> None:
    z, a, bias = torch.randn(N, WIDTH), torch.randn(N, WIDTH), torch.randn(N, N)
    bias[2, 4] = bias[5, 0] = -math.inf
    rows, columns = 0.0, 0.0
    for i in range(N):
        weight = [math.exp(cosine(z[i], a[j]) / 0.2 + float(bias[i, j])) for j in range(N)]
        rows -= math.log(weight[i] / sum(weight)) / N
        weight = [math.exp(cosine(z[j], a[i]) / 0.2 + float(bias[j, i])) for j in range(N)]
        columns -= math.log(weight[i] / sum(weight)) / N
    wanted = (rows + columns) / 2 if symmetric else rows
    assert float(contrast(z, a, 0.2, bias, symmetric=symmetric)) == pytest.approx(wanted, rel=1e-5)


def test_equal_titles_are_no_negatives_and_those_of_the_genre_are_weighted() -> None:
    unit = torch.nn.functional.normalize(torch.randn(5, WIDTH), dim=1)
    unit[3] = unit[1]
    genre = torch.tensor([1, 1, 2, 1, 0])
    bias = negative_bias(unit, genre, 0.25)
    assert bias.diagonal().tolist() == [0] * 5
    assert bias[1, 3] == bias[3, 1] == -math.inf
    assert float(bias[0, 1]) == pytest.approx(math.log(0.25))
    assert bias[0, 2] == bias[4, 0] == bias[2, 4] == 0
    assert negative_bias(unit, genre, 0.0)[0, 1] == -math.inf
    unknown = negative_bias(unit, torch.zeros(5, dtype=torch.int64), 0.25)
    assert unknown[0, 1] == 0


def test_partners_are_weighted_by_their_popularity_and_false_negatives_are_left_out() -> None:
    bias = pair_bias(torch.tensor([1, 2, 3]), torch.tensor([5, 1, 5]), torch.tensor([8, 2, 8]))
    log8, log2 = math.log(8), math.log(2)
    wanted = torch.tensor([[-log8, -math.inf, -math.inf], [-log8, -log2, -log8], [-math.inf, -log2, -log8]])
    assert torch.allclose(bias, wanted)


def test_structure_is_the_divergence_of_similarities_without_the_item_itself() -> None:
    unit = torch.nn.functional.normalize(torch.randn(N, 3), dim=1)
    z = torch.randn(N, WIDTH)
    total = 0.0
    for i in range(N):
        others = [j for j in range(N) if j != i]
        p = torch.tensor([cosine(unit[i], unit[j]) / 0.3 for j in others]).softmax(0)
        q = torch.tensor([cosine(z[i], z[j]) / 0.3 for j in others]).softmax(0)
        total += float((p * (p / q).log()).sum()) / N
    assert float(structure(unit, z, 0.3)) == pytest.approx(total, rel=1e-4)
    assert float(structure(unit, 3 * unit, 0.3)) == pytest.approx(0, abs=1e-5)


def test_anti_collapse_is_a_hinge_of_deviations_and_a_sum_of_covariances() -> None:
    z = 0.7 * torch.randn(N, WIDTH)
    covariance = torch.cov(z.t())
    hinge = sum(max(0.0, 1 - math.sqrt(float(covariance[j, j]) + 1e-4)) for j in range(WIDTH)) / WIDTH
    off = sum(float(covariance[j, k]) ** 2 for j in range(WIDTH) for k in range(WIDTH) if j != k) / WIDTH
    assert float(anti_collapse(z, 0.5)) == pytest.approx(hinge + 0.5 * off, rel=1e-4)
    assert float(anti_collapse(z * 0, 0.5)) == pytest.approx(1 - 0.01, rel=1e-4)


def test_sliced_distance_is_that_of_sorted_projections() -> None:
    z = torch.randn(N, WIDTH)
    torch.manual_seed(4)
    found = float(sliced_wasserstein(z))
    torch.manual_seed(4)
    directions = torch.randn(WIDTH, 64)
    normal = torch.distributions.Normal(0.0, 1.0)
    quantiles = [float(normal.icdf(torch.tensor((i + 0.5) / N))) for i in range(N)]
    total = 0.0
    for k in range(64):
        projected = sorted(float(row @ directions[:, k] / directions[:, k].norm()) for row in z)
        total += sum((x - y) ** 2 for x, y in zip(projected, quantiles, strict=True)) / (N * 64)
    assert found == pytest.approx(total, rel=1e-4)


@pytest.mark.parametrize("distance", ["sliced", "mmd"])
def test_a_normal_sample_is_closer_to_a_normal_distribution_than_others(distance: str) -> None:
    normal = torch.randn(500, 4)
    others = normal * 0.1, normal + 2, normal[:, :1].expand(-1, 4).contiguous()
    at_normal = float(distribution(normal, distance))
    assert at_normal < 0.05
    assert all(float(distribution(z, distance)) > at_normal + 0.05 for z in others)


def test_uniformity_is_the_log_mean_of_kernels_of_pairs() -> None:
    z = torch.randn(N, WIDTH)
    u = z / z.norm(dim=1, keepdim=True)
    kernels = [
        math.exp(-2 * float((u[i] - u[j]).square().sum())) for i in range(N) for j in range(N) if i != j
    ]
    assert float(uniformity(z)) == pytest.approx(math.log(sum(kernels) / len(kernels)), rel=1e-5)
    assert float(distribution(z, "uniformity")) == float(uniformity(z))


@pytest.mark.parametrize("rows", [0, 1])
def test_too_few_rows_cost_nothing_and_have_gradients(rows: int) -> None:
    z = torch.randn(rows, WIDTH, requires_grad=True)
    none = torch.zeros(rows, rows)
    losses = [
        contrast(z, z, 0.1, none),
        structure(z.detach(), z, 0.1),
        anti_collapse(z, 1.0),
        *(distribution(z, name) for name in ("sliced", "mmd", "uniformity")),
    ]
    total = torch.stack(losses).sum()
    total.backward()  # type: ignore[no-untyped-call]
    assert float(total.detach()) == 0
    assert z.grad is not None
