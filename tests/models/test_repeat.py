"""Own-item features against a plain walk through every history."""

from __future__ import annotations

import math

import pytest
import torch

from findrec.datasets.batch import Batch
from findrec.models import repeat
from findrec.models.repeat import JUST_NOW, LAG_SCALE, NUM_REPEAT_FEATURES, RECENT, RepeatHead, own_items


def make_batch(lengths: list[int], *, num_items: int, width: int, every: int = 1, seed: int = 0) -> Batch:
    generator = torch.Generator().manual_seed(seed)
    item = torch.zeros(len(lengths), width, dtype=torch.int64)
    position = []
    for b, length in enumerate(lengths):
        item[b, :length] = torch.randint(1, num_items + 1, (length,), generator=generator)
        position += [b * width + step for step in range(length - 1, -1, -every)][::-1]
    count = torch.tensor(lengths)
    user = torch.arange(len(lengths))
    return Batch.build(item, count, user, torch.tensor(position), torch.zeros(0, dtype=torch.int64))


def naive(history: list[int], step: int) -> dict[int, list[float]]:
    """Item -> its features after `step`, counted one event after the other."""
    features = {}
    for item in set(history[: step + 1]):
        places = [k for k, other in enumerate(history[: step + 1]) if other == item]
        lag = step - places[-1]
        recent = sum(k > step - RECENT for k in places)
        values = (1.0, math.log1p(len(places)), LAG_SCALE * math.log1p(lag), math.log1p(recent))
        features[item] = [*values, math.exp(-lag / JUST_NOW)]
    return features


@pytest.mark.parametrize(
    ("lengths", "num_items", "width", "every"),
    [([1], 5, 1, 1), ([7, 1, 4], 3, 9, 1), ([250, 130, 31], 12, 256, 17), ([60, 60], 1000, 60, 60)],
)
def test_own_items_equals_a_walk(lengths: list[int], num_items: int, width: int, every: int) -> None:
    batch = make_batch(lengths, num_items=num_items, width=width, every=every)
    own = own_items(batch)
    assert own.phi_TNR.shape == (*own.seen_TN.shape, NUM_REPEAT_FEATURES)
    for b in range(len(lengths)):
        distinct = sorted(set(batch.item[b].tolist()) - {0})
        assert own.ids_BN[b].tolist() == distinct + [0] * (own.ids_BN.shape[1] - len(distinct))
    for t, position in enumerate(batch.position.tolist()):
        row, step = divmod(position, width)
        assert own.row_T[t] == row
        expected = naive(batch.item[row].tolist(), step)
        for n, item in enumerate(own.ids_BN[row].tolist()):
            assert bool(own.seen_TN[t, n]) == (item in expected)
            given = own.phi_TNR[t, n].tolist()
            assert given == pytest.approx(expected.get(item, [0.0] * NUM_REPEAT_FEATURES), abs=1e-5)


def test_blocks_of_rows_change_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    batch = make_batch([30, 2, 17, 9, 30], num_items=20, width=32, every=3)
    whole = own_items(batch)
    monkeypatch.setattr(repeat, "_BLOCK_ELEMENTS", 1)
    for a, b in zip(vars(whole).values(), vars(own_items(batch)).values(), strict=True):
        assert torch.equal(a, b)


def test_the_future_changes_no_feature() -> None:
    batch = make_batch([40], num_items=6, width=40)
    changed = batch.item.clone()
    changed[0, 25:] = torch.randint(1, 7, (15,))
    other = Batch.build(changed, batch.length, batch.user, batch.position, batch.target)
    a, b = own_items(batch), own_items(other)
    for item in range(1, 7):
        left = a.phi_TNR[:25][:, a.ids_BN[0] == item].sum((0, 1))
        right = b.phi_TNR[:25][:, b.ids_BN[0] == item].sum((0, 1))
        assert torch.equal(left, right)


def test_head_starts_without_bonus_and_learns() -> None:
    head = RepeatHead(8)
    h = torch.randn(3, 8)
    weights = head(h)
    assert torch.equal(weights, torch.zeros(3, NUM_REPEAT_FEATURES))
    weights.sum().backward()
    assert head.weights.weight.grad is not None
    assert head.weights.weight.grad.abs().sum() > 0
