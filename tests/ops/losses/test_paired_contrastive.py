"""The contrastive term against its definition row by row, and what it is used for."""

from __future__ import annotations

import math

import pytest
import torch

from findrec.ops.losses.paired_contrastive import paired_contrastive
from findrec.ops.stein.stein_discrepancy import stein_discrepancy


@pytest.mark.parametrize("n", [2, 3, 17])
@pytest.mark.parametrize("grouped", [False, True])
def test_equals_the_definition(n: int, grouped: bool) -> None:
    torch.manual_seed(0)
    Z, A = torch.randn(n, 4).double(), torch.randn(n, 4).double()
    group = torch.arange(n) // 2 if grouped else None
    total = 0.0
    for asks, tells in ((Z, A), (A, Z)):
        for i in range(n):
            against = [j for j in range(n) if group is None or i == j or group[i] != group[j]]
            cosines = torch.stack([torch.cosine_similarity(asks[i], tells[j], dim=0) for j in against])
            total -= float((cosines / 0.2).log_softmax(0)[against.index(i)])
    found = paired_contrastive(Z, A, temperature=0.2, group_n=group)
    assert found.item() == pytest.approx(total / (2 * n))


def test_gradient_is_that_of_finite_differences() -> None:
    torch.manual_seed(0)
    inputs = [torch.randn(5, 3).double().requires_grad_() for _ in range(2)]
    group = torch.tensor([0, 1, 1, 2, 3])
    assert torch.autograd.gradcheck(lambda Z, A: paired_contrastive(Z, A, group_n=group), inputs)


def test_ties_rows_together_where_the_discrepancy_is_blind() -> None:
    torch.manual_seed(0)
    A = torch.randn(64, 16)
    shuffled = A.roll(1, 0)
    assert stein_discrepancy(shuffled, A).item() == pytest.approx(stein_discrepancy(A, A).item(), abs=1e-5)
    assert paired_contrastive(A, A).item() < 0.1
    assert paired_contrastive(shuffled, A).item() > math.log(64)


def test_twins_do_not_push_each_other_away() -> None:
    torch.manual_seed(0)
    Z, A = torch.randn(3, 4).requires_grad_(), torch.randn(3, 4)
    value = paired_contrastive(Z, A, group_n=torch.tensor([7, 7, 7]))
    (gradient,) = torch.autograd.grad(value, Z)
    assert value.item() == 0.0  # nothing but twins: nothing to tell apart
    assert gradient.count_nonzero() == 0
    assert paired_contrastive(Z, A, group_n=torch.tensor([7, 8, 9])).item() > 0


def test_few_rows_precision_and_wrong_arguments() -> None:
    for n in (0, 1):
        Z = torch.randn(n, 4, requires_grad=True)
        value = paired_contrastive(Z, torch.randn(n, 4))
        assert value.item() == 0.0
        value.backward()  # type: ignore[no-untyped-call]
    Z, A = torch.randn(9, 4), torch.randn(9, 4)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(paired_contrastive(Z, A), paired_contrastive(Z.float(), A))
    with pytest.raises(ValueError, match="pairs of rows"):
        paired_contrastive(Z, A[:5])
    with pytest.raises(ValueError, match="group_n"):
        paired_contrastive(Z, A, group_n=torch.zeros(3, dtype=torch.int64))
    with pytest.raises(ValueError, match="temperature=0"):
        paired_contrastive(Z, A, temperature=0)
