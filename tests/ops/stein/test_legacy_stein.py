"""The public code's term is the formula written down, and has the faults its module tells of."""

from __future__ import annotations

import pytest
import torch

from findrec.ops.stein.legacy_stein import legacy_stein
from findrec.ops.stein.stein_discrepancy import stein_discrepancy
from findrec.ops.stein.stein_scores import gaussian_score


def test_equals_the_formula_pair_by_pair() -> None:
    torch.manual_seed(0)
    Z, A = torch.randn(4, 3).double(), torch.randn(5, 3).double()
    S, T, h = torch.randn(4, 3).double(), torch.randn(5, 3).double(), 1.7
    total = 0.0
    for x, sx in zip(Z, S, strict=True):
        for y, sy in zip(A, T, strict=True):
            r2 = (x - y).square().sum()
            terms = sx @ sy + (x - y) @ sy / h**2 + r2 / h**4 - 3 / h**2
            total += float(torch.exp(-r2 / (2 * h**2)) * terms)
    assert legacy_stein(Z, S, A, T, bandwidth=h).item() == pytest.approx(total / 20)


def test_equal_laws_are_not_zero() -> None:
    """With the true score of both samples, where the discrepancy vanishes."""
    torch.manual_seed(0)
    Z, A = torch.randn(400, 8), torch.randn(400, 8)
    assert abs(legacy_stein(Z, gaussian_score(Z, A), A, gaussian_score(A, A)).item()) > 0.1
    assert abs(stein_discrepancy(Z, A).item()) < 0.01


def test_collapse_is_rewarded() -> None:
    """With zero scores; the discrepancy grows, as it should."""
    torch.manual_seed(0)
    Z, A, none = torch.randn(200, 8), torch.randn(200, 8), torch.zeros(200, 8)
    values = [legacy_stein(c * Z, none, c * A, none).item() for c in (1.0, 0.3, 0.01)]
    assert 0 > values[0] > values[1] > values[2]
    assert values[2] < -8 / 0.1**2 * 0.9  # -D / h^2 with h at its least
    assert stein_discrepancy(0.01 * Z, A).item() > 10 * abs(stein_discrepancy(Z, A).item())


def test_free_scores_take_it_down_without_bound() -> None:
    torch.manual_seed(0)
    Z, score = torch.randn(50, 8), torch.ones(50, 8)
    values = [legacy_stein(Z, score, Z, -c * score).item() for c in (10.0, 1e3, 1e5)]
    assert values[1] == pytest.approx(100 * values[0], rel=0.2)
    assert values[2] < -1e4


def test_empty_samples_and_wrong_shapes() -> None:
    empty, full = torch.randn(0, 3), torch.randn(4, 3)
    assert legacy_stein(empty, empty, full, full).item() == 0.0
    with pytest.raises(ValueError, match="each before its score"):
        legacy_stein(full, torch.randn(4, 2), full, full)
