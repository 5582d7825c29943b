"""The contrastive loss against its definition in float64."""

from __future__ import annotations

import math

import pytest
import torch

from findrec.models.parts.contrast import info_nce, sample_rows


@pytest.mark.parametrize("temperature", [0.05, 1.0])
def test_info_nce_is_its_definition(temperature: float) -> None:
    torch.manual_seed(0)
    one, two = torch.randn(7, 5), torch.randn(7, 5)
    group = torch.tensor([3, 1, 3, 2, 1, 3, 9])
    total = 0.0
    for i in range(7):
        cosine = [
            float(one[i].double() @ two[j].double() / (one[i].double().norm() * two[j].double().norm()))
            for j in range(7)
        ]
        rivals = [j for j in range(7) if j == i or group[j] != group[i]]
        log_sum = math.log(sum(math.exp(cosine[j] / temperature) for j in rivals))
        total += log_sum - cosine[i] / temperature
    got = info_nce(one, two, group, temperature)
    assert math.isclose(float(got), total / 7, rel_tol=1e-5)


def test_pairs_of_one_group_do_not_repel_each_other() -> None:
    """Not even by a constant: with a logit of 0 for them the loss of a perfect match would stay positive."""
    one = torch.randn(4, 3, requires_grad=True)
    loss = info_nce(one, one.detach(), torch.full((4,), 5), 0.2)
    loss.backward()  # type: ignore[no-untyped-call]
    assert float(loss) == 0
    assert one.grad is not None
    assert torch.equal(one.grad, torch.zeros_like(one))


def test_rows_are_drawn_only_where_there_are_too_many() -> None:
    assert sample_rows(5, 5, torch.device("cpu")) is None
    chosen = sample_rows(50, 5, torch.device("cpu"))
    assert chosen is not None
    assert len(chosen.unique()) == 5
    assert chosen.max() < 50
