"""Cosine scores: lengths, and the gradient where there is no length."""

from __future__ import annotations

import pytest
import torch

from findrec.models.parts.cosine import LENGTH_FLOOR, CosineQueries, unit_vectors


def test_products_are_cosines_over_the_temperature() -> None:
    torch.manual_seed(0)
    rows, h = torch.randn(5, 8), torch.randn(3, 8)
    want = torch.nn.functional.cosine_similarity(h[:, None], rows, dim=-1) / 0.1
    # Up to the floor of the lengths.
    torch.testing.assert_close(CosineQueries(0.1)(h) @ unit_vectors(rows).t(), want, rtol=1e-3, atol=1e-3)


def test_the_gradient_of_zero_rows_is_bounded() -> None:
    rows = torch.zeros(1, 8, requires_grad=True)
    unit_vectors(rows).sum().backward()
    assert rows.grad is not None
    assert rows.grad.max().item() == pytest.approx(1 / LENGTH_FLOOR)
