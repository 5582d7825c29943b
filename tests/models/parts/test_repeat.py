"""Own items and their features against a plain walk through every history."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from findrec.datasets.batches.batch import Batch
from findrec.models.parts.repeat import REPEAT_WINDOW, RepeatCandidates, RepeatHead, repeat_candidates
from findrec.ops.losses.linear_cross_entropy import linear_cross_entropy
from findrec.ops.losses.sampled_cross_entropy import sampled_cross_entropy
from findrec.ops.repeat_bonus import (
    LAG_DECAY,
    LAG_SCALE,
    NUM_REPEAT_FEATURES,
    RECENT,
    repeat_features_of_history,
)


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


def features(repeat: RepeatCandidates) -> tuple[Tensor, Tensor]:
    num_candidates = repeat.ids_PN.shape[1]
    return repeat_features_of_history(
        repeat.rank_PE, repeat.row_T, repeat.step_T, num_candidates=num_candidates, window=repeat.window
    )


def naive(history: list[int], step: int, window: int) -> dict[int, list[float]]:
    """Item -> its features after `step`, counted one event after the other."""
    result = {}
    for item in set(history[max(0, step - window + 1) : step + 1]):
        steps = [k for k in range(max(0, step - window + 1), step + 1) if history[k] == item]
        lag = step - steps[-1]
        recent = sum(k > step - RECENT for k in steps)
        values = (1.0, math.log1p(len(steps)), LAG_SCALE * math.log1p(lag), math.log1p(recent))
        result[item] = [*values, math.exp(-lag / LAG_DECAY)]
    return result


WALKS = [  # lengths, items, padded width, every, window
    ([1], 5, 1, 1, REPEAT_WINDOW),
    ([7, 1, 4], 3, 9, 1, REPEAT_WINDOW),
    ([250, 130, 31], 12, 256, 17, 256),  # as long as the window
    ([60, 60], 1000, 60, 60, REPEAT_WINDOW),
    ([40, 3, 17], 9, 41, 1, 40),  # one event longer than the window
    ([40, 3, 17], 9, 40, 1, 7),
    ([50, 21], 4, 50, 3, 1),
    ([400, 170], 60, 400, 13, 150),
    ([300, 299], 30, 300, 300, 16),  # the last positions alone
]


@pytest.mark.parametrize(("lengths", "num_items", "width", "every", "window"), WALKS)
def test_repeat_candidates_equal_a_walk(
    lengths: list[int], num_items: int, width: int, every: int, window: int
) -> None:
    batch = make_batch(lengths, num_items=num_items, width=width, every=every)
    repeat = repeat_candidates(batch, window)
    phi_TNR, seen_TN = features(repeat)
    for ids in repeat.ids_PN.tolist():
        distinct = sorted(set(ids) - {0})
        assert ids == distinct + [0] * (len(ids) - len(distinct))
    for t, position in enumerate(batch.position.tolist()):
        row, step = divmod(position, width)
        expected = naive(batch.item[row].tolist(), step, window)
        ids = repeat.ids_PN[repeat.row_T[t]].tolist()
        assert set(expected) <= set(ids)
        for n, item in enumerate(ids):
            assert bool(seen_TN[t, n]) == (item in expected)
            given = phi_TNR[t, n].tolist()
            assert given == pytest.approx(expected.get(item, [0.0] * NUM_REPEAT_FEATURES), abs=1e-5)


def dense(repeat: RepeatCandidates, num_items: int, impl: str) -> Tensor:
    """`[T, V + 1]` bonuses by item, from weights that differ by position."""
    weights = torch.linspace(-1, 2, len(repeat.row_T) * NUM_REPEAT_FEATURES).view(-1, NUM_REPEAT_FEATURES)
    bonus = repeat.bonus(weights, impl)  # type: ignore[arg-type]
    assert (bonus.bonus_TN[~bonus.seen_TN] == 0).all()
    out = torch.zeros(len(weights), num_items + 1)
    return out.scatter_add_(1, bonus.ids_BN[bonus.row_T], bonus.bonus_TN)


@pytest.mark.parametrize("impl", ["reference", "cpp"])
@pytest.mark.parametrize("window", [5, 50, 120])
def test_edges_of_pieces_and_padding_change_nothing(window: int, impl: str) -> None:
    batch = make_batch([130, 60, 7], num_items=25, width=130)
    wide = torch.nn.functional.pad(batch.item, (0, 77))
    position = batch.position + 77 * (batch.position // 130)
    other = Batch.build(wide, batch.length, batch.user, position, batch.target)
    assert torch.equal(
        dense(repeat_candidates(batch, window), 25, impl), dense(repeat_candidates(other, window), 25, impl)
    )
    # A history without the events before the window of its last position.
    last = repeat_candidates(make_batch([130], num_items=25, width=130, every=130), window)
    tail = batch.item[:1, -window:].contiguous()
    zero = torch.zeros(1, dtype=torch.int64)
    cut = Batch.build(tail, zero + window, zero, zero + window - 1, batch.target)
    torch.testing.assert_close(
        dense(last, 25, impl), dense(repeat_candidates(cut, window), 25, impl), rtol=0, atol=1e-6
    )


def test_losses_over_pieces_are_those_of_all_logits() -> None:
    num_items, window = 12, 9
    batch = make_batch([60, 25, 8], num_items=num_items, width=60)
    generator = torch.Generator().manual_seed(2)
    num = len(batch.position)
    table, h = (torch.randn(n, 4, generator=generator, dtype=torch.float64) for n in (num_items + 1, num))
    target = torch.randint(1, num_items + 1, (num,), generator=generator)
    weights = torch.randn(num, NUM_REPEAT_FEATURES, generator=generator).double().requires_grad_()
    repeat = repeat_candidates(batch, window).bonus(weights)
    assert len(repeat.ids_BN) > len(batch.item)  # rows were cut
    logits = (h @ table.t()).scatter_add(1, repeat.ids_BN[repeat.row_T], repeat.bonus_TN)
    want = torch.nn.functional.cross_entropy(logits[:, 1:], target - 1, reduction="sum")
    every = torch.arange(1, num_items + 1)  # as negatives that are not corrected: the same softmax
    result = {
        "exact": linear_cross_entropy(h, table, target, repeat=repeat),
        "sampled": sampled_cross_entropy(
            h, table[target], table[1:], target, every, repeat=repeat, candidate_row_BNd=table[repeat.ids_BN]
        ),
    }
    gradient = torch.autograd.grad(want, weights, retain_graph=True)
    for name, loss in result.items():
        torch.testing.assert_close(loss, want, msg=name)
        torch.testing.assert_close(torch.autograd.grad(loss, weights, retain_graph=True), gradient, msg=name)


def test_only_chunks_with_target_positions_are_built() -> None:
    width, window = 4000, 64
    last = repeat_candidates(make_batch([width, 900, 3], num_items=50, width=width, every=width), window)
    assert last.rank_PE.shape == (3, window - 1 + window // 4)
    assert last.row_T.tolist() == [0, 1, 2]


def test_the_future_changes_no_feature() -> None:
    batch = make_batch([40], num_items=6, width=40)
    changed = batch.item.clone()
    changed[0, 25:] = torch.randint(1, 7, (15,))
    other = Batch.build(changed, batch.length, batch.user, batch.position, batch.target)
    for window in (8, REPEAT_WINDOW):
        a, b = (dense(repeat_candidates(x, window), 6, "auto")[:25] for x in (batch, other))
        assert torch.equal(a, b)


def test_a_batch_that_asks_nothing_still_has_a_loss() -> None:
    batch = make_batch([9, 4], num_items=6, width=9)
    none = batch.position[:0]
    repeat = repeat_candidates(Batch.build(batch.item, batch.length, batch.user, none, none)).bonus(
        torch.zeros(0, NUM_REPEAT_FEATURES)
    )
    table = torch.randn(7, 3)
    rows = table[repeat.ids_BN]
    h = torch.zeros(0, 3)
    loss = sampled_cross_entropy(
        h, h, table[1:4], none, torch.arange(1, 4), repeat=repeat, candidate_row_BNd=rows
    )
    assert loss == 0


def test_head_starts_without_bonus_and_learns() -> None:
    head = RepeatHead(8)
    h = torch.randn(3, 8)
    weights = head(h)
    assert torch.equal(weights, torch.zeros(3, NUM_REPEAT_FEATURES))
    weights.sum().backward()
    assert head.weights.weight.grad is not None
    assert head.weights.weight.grad.abs().sum() > 0
