"""The losses of the sequence stage against plain definitions."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch

from findrec.datasets.batches.batch import Batch
from findrec.models.mufasa.preference import consistency_loss, preference_loss
from findrec.tables.initial_rows import TABLE_STD


def make_batch(targets: list[int]) -> Batch:
    item = torch.tensor([[3, 5, 7, 9], [5, 2, 3, 2]])
    length, user = torch.tensor([4, 4]), torch.arange(2)
    return Batch.build(item, length, user, torch.arange(8), torch.tensor(targets))


def test_preference_contrasts_distinct_targets_that_the_batch_knows() -> None:
    torch.manual_seed(0)
    batch = make_batch([5, 7, 9, 40, 2, 3, 2, 1])  # 40 and 1 are in no history, 2 occurs twice
    h, vectors = torch.randn(8, 6), torch.randn(len(batch.ids), 6)
    ids = batch.ids.tolist()
    classes = [2, 3, 5, 7, 9]
    total = 0.0
    used = [t for t in range(8) if int(batch.target[t]) in classes]
    for t in used:
        weight = {
            v: math.exp(float(torch.cosine_similarity(h[t], vectors[ids.index(v)], dim=0)) / 0.2)
            for v in classes
        }
        total -= math.log(weight[int(batch.target[t])] / sum(weight.values())) / len(used)
    assert float(preference_loss(h, vectors, batch, 0.2)) == pytest.approx(total, rel=1e-5)


@pytest.mark.parametrize("targets", [[40] * 8, [5] * 8])
def test_preference_without_negatives_costs_nothing(targets: list[int]) -> None:
    batch = make_batch(targets)
    h = torch.randn(8, 6, requires_grad=True)
    loss = preference_loss(h, torch.randn(len(batch.ids), 6), batch, 0.2)
    loss.backward()  # type: ignore[no-untyped-call]
    assert float(loss.detach()) == 0
    assert h.grad is not None


def test_preference_reads_targets_and_not_their_order() -> None:
    torch.manual_seed(0)
    batch = make_batch([5, 7, 9, 3, 2, 3, 2, 9])
    h, vectors = torch.randn(8, 6), torch.randn(len(batch.ids), 6)
    order = torch.randperm(8)
    other = replace(batch, target=batch.target[order])
    assert torch.allclose(
        preference_loss(h[order], vectors, other, 0.2), preference_loss(h, vectors, batch, 0.2)
    )


def test_consistency_is_a_distance_of_content_from_known_rows_that_moves_content_only() -> None:
    torch.manual_seed(0)
    content, rows = torch.randn(5, 3, requires_grad=True), torch.randn(5, 3, requires_grad=True)
    with torch.no_grad():
        rows[1] = 0  # has no events
    present = torch.tensor([True, True, False, True, True])
    loss = consistency_loss(content, rows, present)
    wanted = sum(float((content[i] - rows[i]).detach().square().sum()) for i in (0, 3, 4)) / 3 / TABLE_STD**2
    assert float(loss.detach()) == pytest.approx(wanted, rel=1e-5)
    loss.backward()  # type: ignore[no-untyped-call]
    assert rows.grad is None
    assert content.grad is not None
    assert (content.grad.abs().sum(1) > 0).tolist() == [True, False, False, True, True]
