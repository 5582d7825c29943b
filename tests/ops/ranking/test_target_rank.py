"""Exact counts against a plain float64 oracle: ties, near-ties, duplicates, bonuses, filters, odd numbers."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from bench.memory import peak_bytes
from torch import Tensor

from findrec.ops.ranking.counting import rank_dense
from findrec.ops.ranking.rules import Rules
from findrec.ops.ranking.target_rank import dot64, target_rank


def oracle(
    users: Tensor,
    items: Tensor,
    row: Tensor,
    target: Tensor,
    own_ids: Tensor | None = None,
    own_bonus: Tensor | None = None,
    exclude_ids: Tensor | None = None,
    since: Tensor | None = None,
    time: Tensor | None = None,
) -> tuple[list[int], list[int]]:
    """One case after the other, every item scored by a Python-ordered float64 sum."""
    x, y = users.numpy().astype(np.float64), items.numpy().astype(np.float64)
    greater, equal = [], []
    with np.errstate(all="ignore"):
        for c, (b, t) in enumerate(zip(row.tolist(), target.tolist(), strict=True)):
            each = np.zeros((len(vectors := np.atleast_2d(x[b])), len(y)))
            for k in range(x.shape[-1]):
                each = each + vectors[:, k : k + 1] * y[:, k]
            score = each.max(0)
            if own_ids is not None and own_bonus is not None:
                given: set[int] = {0}
                for i, bonus in zip(own_ids[b].tolist(), own_bonus[b].tolist(), strict=True):
                    if i not in given:
                        score[i] += bonus
                        given.add(i)
            rivals = set(range(1, len(y))) - {t}
            if exclude_ids is not None:
                rivals -= set(exclude_ids[b].tolist())
            if since is not None and time is not None:
                rivals &= set((since <= time[c]).nonzero()[:, 0].tolist())
            rival = np.array(sorted(rivals), dtype=np.int64)
            if np.isnan(score[t]):
                greater.append(len(rival))
                equal.append(0)
            else:
                greater.append(int((score[rival] > score[t]).sum()))
                equal.append(int((score[rival] == score[t]).sum()))
    return greater, equal


def agree(users: Tensor, items: Tensor, row: Tensor, target: Tensor, **extra: Any) -> None:
    renamed = {"own_ids_BN": "own_ids", "own_bonus_BN": "own_bonus", "exclude_ids_BN": "exclude_ids"}
    renamed |= {"since_V": "since", "time_C": "time"}
    expected = oracle(users, items, row, target, **{renamed[k]: v for k, v in extra.items() if k in renamed})
    for impl in ("int16", "float32", "torch", "bfloat16", "exact"):
        rules = Rules(**{name: value for name, value in extra.items() if name in renamed})
        more = {name: value for name, value in extra.items() if name not in renamed}
        greater, equal = target_rank(users, items, row, target, rules=rules, impl=impl, **more)  # type: ignore[arg-type]
        assert greater.tolist() == expected[0], impl
        assert equal.tolist() == expected[1], impl


def cases(num_users: int, num_items: int, count: int, seed: int = 0) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    row = torch.randint(0, num_users, (count,), generator=generator)
    return row, torch.randint(1, num_items + 1, (count,), generator=generator)


@pytest.mark.parametrize("width", [1, 7, 64])
@pytest.mark.parametrize(("num_users", "num_items"), [(1, 1), (5, 40), (33, 301)])
def test_random_vectors(num_users: int, num_items: int, width: int) -> None:
    torch.manual_seed(width)
    users, items = torch.randn(num_users, width), torch.randn(num_items + 1, width)
    agree(users, items, *cases(num_users, num_items, 90))


def test_by_hand() -> None:
    items = torch.tensor([[9.0], [3.0], [1.0], [3.0], [2.0]])  # row 0, the padding, would win
    greater, equal = target_rank(
        torch.ones(1, 1), items, torch.zeros(4, dtype=torch.int64), torch.tensor([1, 2, 3, 4])
    )
    assert greater.tolist() == [0, 3, 0, 2]
    assert equal.tolist() == [1, 0, 1, 0]


def test_near_ties_below_float32_resolution() -> None:
    """Items one float32 step apart: a float32 product mixes them up, the counts do not."""
    torch.manual_seed(3)
    base = torch.randn(16)
    rows = [torch.zeros(16), base]
    for k in range(120):
        near = base.clone()
        near[k % 16] = torch.nextafter(near[k % 16], torch.tensor(float("inf") if k % 3 else -float("inf")))
        rows.append(near)
    items = torch.stack(rows)
    users = base + 0.1 * torch.randn(6, 16)
    row, target = cases(6, len(items) - 1, 60)
    single = users @ items[1:].T
    assert any(
        int((single[b] > single[b, t - 1]).sum()) != g
        for b, t, g in zip(row, target, oracle(users, items, row, target)[0], strict=True)
    ), "the example is too easy: float32 gets it right"
    agree(users, items, row, target)


def test_cancellation() -> None:
    """Large terms cancel, so the float32 score is nearly all error."""
    torch.manual_seed(4)
    half = 1e4 * torch.randn(200, 8)
    items = torch.cat([half, -half + 1e-3 * torch.randn(200, 8)], dim=1)
    users = torch.randn(4, 8).repeat(1, 2)
    agree(users, items, *cases(4, 199, 50))


def test_duplicate_rows_are_equal() -> None:
    torch.manual_seed(5)
    items = torch.randn(31, 12)[torch.arange(93) % 31]  # every vector three times; 0, 31 and 62 are one
    users = torch.randn(4, 12)
    row, target = cases(4, 92, 50)
    _, equal = target_rank(users, items, row, target)
    assert equal.tolist() == [1 if t % 31 == 0 else 2 for t in target.tolist()]
    agree(users, items, row, target)


def test_constant_scores_tie_with_everything() -> None:
    row, target = cases(3, 50, 20)
    greater, equal = target_rank(torch.zeros(3, 8), torch.randn(51, 8), row, target)
    assert greater.tolist() == [0] * 20
    assert equal.tolist() == [49] * 20


@pytest.mark.parametrize("seed", range(4))
def test_own_bonus_and_filter(seed: int) -> None:
    torch.manual_seed(seed)
    num_users, num_items = 9, 60
    users, items = torch.randn(num_users, 6), torch.randn(num_items + 1, 6)
    items[20:30] = items[30:40]
    own = torch.randint(0, num_items + 1, (num_users, 12))
    own[:, 5] = own[:, 2]  # a repeated id: the first bonus counts
    bonus = torch.randn(num_users, 12).round()
    bonus[0] = 0
    exclude = torch.randint(0, num_items + 1, (num_users, 15))
    exclude[:, 3] = exclude[:, 1]
    row, target = cases(num_users, num_items, 70, seed)
    target[:20] = own[row[:20], 2].clamp(min=1)  # targets among the own items
    target[20:30] = exclude[row[20:30], 1].clamp(min=1)  # and among the excluded ones
    agree(users, items, row, target, own_ids_BN=own, own_bonus_BN=bonus)
    agree(users, items, row, target, exclude_ids_BN=exclude)
    agree(users, items, row, target, own_ids_BN=own, own_bonus_BN=bonus, exclude_ids_BN=exclude)


def test_odd_numbers() -> None:
    torch.manual_seed(6)
    users, items = torch.randn(6, 5), torch.randn(41, 5)
    items[7, 2] = torch.nan
    items[8, 0] = torch.inf
    items[9] = 3e38
    items[10] = 1e-42
    items[11] = 0
    users[1] = 2e38
    users[2, 1] = -torch.inf
    users[3] = torch.nan
    users[4] = 1e-40
    row = torch.arange(6).repeat_interleave(40)
    target = torch.arange(1, 41).repeat(6)
    agree(users, items, row, target)
    greater, _ = target_rank(users, items, torch.tensor([0]), torch.tensor([7]))
    assert greater.tolist() == [39]  # NaN is last of 40
    exclude = torch.tensor([[1, 2, 7]]).repeat(6, 1)
    agree(users, items, row, target, exclude_ids_BN=exclude)
    bonus = torch.tensor([[torch.nan, 0.5, -1.0]]).repeat(6, 1)
    agree(users, items, row, target, own_ids_BN=exclude, own_bonus_BN=bonus)


def test_blocks_and_tiles_change_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(7)
    users, items = torch.randn(300, 16), torch.randn(701, 16)
    items[100:200] = items[1:101].clone()
    row, target = cases(300, 700, 800)
    own, bonus = torch.randint(0, 701, (300, 5)), torch.randn(300, 5)
    whole = target_rank(users, items, row, target, rules=Rules(own_ids_BN=own, own_bonus_BN=bonus))
    for pairs in (1 << 20, 7):
        monkeypatch.setattr("findrec.ops.ranking._rank_special.PAIRS", pairs)
        tiny = target_rank(
            users, items, row, target, rules=Rules(own_ids_BN=own, own_bonus_BN=bonus), tile_mib=1
        )
        assert all(torch.equal(a, b) for a, b in zip(whole, tiny, strict=True))
    for lo in range(0, 300, 77):  # users ranked in blocks, as the workers do
        inside = (row >= lo) & (row < lo + 77)
        rows = slice(lo, lo + 77)
        part = target_rank(
            users[rows],
            items,
            row[inside] - lo,
            target[inside],
            rules=Rules(own_ids_BN=own[rows], own_bonus_BN=bonus[rows]),
        )
        assert all(torch.equal(a[inside], b) for a, b in zip(whole, part, strict=True))


def test_low_precision_settings_do_not_reach_the_screen() -> None:
    torch.manual_seed(8)
    users, items = torch.randn(20, 32), torch.randn(400, 32)
    row, target = cases(20, 399, 60)
    expected = target_rank(users, items, row, target)
    torch.set_float32_matmul_precision("medium")
    try:
        with torch.autocast("cpu", dtype=torch.bfloat16):
            result = target_rank(users, items, row, target)
        assert torch.get_float32_matmul_precision() == "medium"
    finally:
        torch.set_float32_matmul_precision("highest")
    assert all(torch.equal(a, b) for a, b in zip(expected, result, strict=True))


def test_dot64_does_not_depend_on_its_neighbours() -> None:
    torch.manual_seed(9)
    users, items = torch.randn(50, 33), torch.randn(60, 33)
    row, item = torch.randint(0, 50, (500,)), torch.randint(0, 60, (500,))
    together = dot64(users, items, row, item)
    alone = torch.cat([dot64(users, items, row[k : k + 1], item[k : k + 1]) for k in range(500)])
    assert torch.equal(together, alone)


def test_wrong_input_is_refused() -> None:
    users, items, zero = torch.randn(2, 3), torch.randn(5, 3), torch.zeros(1, dtype=torch.int64)
    with pytest.raises(ValueError, match="padding"):
        target_rank(users, items, zero, zero)
    with pytest.raises(ValueError, match="rows must lie"):
        target_rank(users, items, zero + 2, zero + 1)
    with pytest.raises(ValueError, match="float32"):
        target_rank(users.double(), items, zero, zero + 1)
    with pytest.raises(ValueError, match="together"):
        target_rank(users, items, zero, zero + 1, rules=Rules(own_ids_BN=torch.ones(2, 1, dtype=torch.int64)))


@pytest.mark.parametrize("masked", [False, True])
def test_dense_keys(masked: bool) -> None:
    generator = torch.Generator().manual_seed(1)
    num_users, num_items = 6, 500
    keys = torch.randint(0, 9, (num_users, num_items + 1), generator=generator)
    row, target = cases(num_users, num_items, 40)
    exclude = torch.randint(0, num_items + 1, (num_users, 60), generator=generator) if masked else None
    if exclude is not None:
        target[:10] = exclude[row[:10], 4].clamp(min=1)
    expected_greater, expected_equal = [], []
    for b, t in zip(row.tolist(), target.tolist(), strict=True):
        rivals = (
            set(range(1, num_items + 1)) - {t} - (set(exclude[b].tolist()) if exclude is not None else set())
        )
        expected_greater.append(sum(int(keys[b, i] > keys[b, t]) for i in rivals))
        expected_equal.append(sum(int(keys[b, i] == keys[b, t]) for i in rivals))
    for tile_mib in (64, 0):  # one tile, and one item a tile
        greater, equal = rank_dense(
            lambda lo, hi: keys[:, lo:hi].clone(),
            num_items,
            row,
            target,
            num_users=num_users,
            exclude_ids_BN=exclude,
            tile_mib=tile_mib,
        )
        assert greater.tolist() == expected_greater
        assert equal.tolist() == expected_equal


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_cuda_gives_the_same_counts() -> None:
    torch.manual_seed(10)
    users, items = torch.randn(100, 64), torch.randn(5000, 64)
    items[1000:1500] = items[:500]
    row, target = cases(100, 4999, 400)
    own, bonus = torch.randint(0, 5000, (100, 20)), torch.randn(100, 20)
    expected = target_rank(users, items, row, target, rules=Rules(own_ids_BN=own, own_bonus_BN=bonus))
    result = target_rank(
        users.cuda(),
        items.cuda(),
        row.cuda(),
        target.cuda(),
        rules=Rules(own_ids_BN=own.cuda(), own_bonus_BN=bonus.cuda()),
    )
    assert all(torch.equal(a, b.cpu()) for a, b in zip(expected, result, strict=True))


@pytest.mark.parametrize("impl", ["vectors", "dense"])
@pytest.mark.parametrize(("num_users", "num_items", "tile_mib"), [(1, 1, 64), (6, 50, 64), (9, 4500, 1)])
def test_items_compete_from_their_time_on(num_users: int, num_items: int, tile_mib: int, impl: str) -> None:
    """With ties, own and excluded items, targets before their time, NaN, huge vectors and small tiles."""
    generator = torch.Generator().manual_seed(num_items)
    users = torch.randint(-2, 3, (num_users, 3), generator=generator).float()
    items = torch.randint(-2, 3, (num_items + 1, 3), generator=generator).float()
    row, target = cases(num_users, num_items, 80)
    since = torch.randint(0, 9, (num_items + 1,), generator=generator)
    time = torch.randint(-1, 10, (80,), generator=generator)
    near = torch.iinfo(torch.int64)
    since[1 + num_items // 3], since[1 + num_items // 2] = near.min, near.max
    ids = torch.randint(0, num_items + 1, (2, num_users, 5), generator=generator)
    bonus = torch.randint(-1, 2, (num_users, 5), generator=generator).float()
    extra: dict[str, Any] = {"exclude_ids_BN": ids[1], "since_V": since, "time_C": time}
    if impl == "dense":

        def keys(lo: int, hi: int) -> Tensor:
            return (users @ items[lo:hi].T).long()

        result = rank_dense(keys, num_items, row, target, num_users=num_users, tile_mib=tile_mib, **extra)
        expected = oracle(users, items, row, target, None, None, ids[1], since, time)
        assert (result[0].tolist(), result[1].tolist()) == expected
        return
    extra |= {"own_ids_BN": ids[0], "own_bonus_BN": bonus}
    agree(users, items, row, target, tile_mib=tile_mib, **extra)
    items[1 + num_items // 2 :: 5] = torch.nan
    agree(users, items, row, target, tile_mib=tile_mib, **extra)
    users[0] = 2.0**70
    agree(users, items, row, target, tile_mib=tile_mib, **extra)


def test_times_are_given_together() -> None:
    ones = torch.ones(2, 1)
    with pytest.raises(ValueError, match="together"):
        target_rank(
            ones, ones, torch.tensor([0]), torch.tensor([1]), rules=Rules(since_V=torch.tensor([0, 0]))
        )


def make_ranking(num_items: int) -> Callable[[], object]:
    items, users = torch.randn(num_items + 1, 128), torch.randn(16, 128)
    return lambda: target_rank(users, items, torch.arange(16), torch.arange(1, 17), impl="torch")


def test_torch_ranks_many_items_beside_little_more_than_they_take() -> None:
    assert peak_bytes(make_ranking, 300_000) < 100 << 20 < 4 * 128 * 300_000


@pytest.mark.parametrize("vectors", [1, 2, 5])
@pytest.mark.parametrize("kind", ["random", "ties", "near", "odd"])
@pytest.mark.parametrize("tile_mib", [0, 64])
def test_the_largest_of_several_vectors_is_the_score(vectors: int, kind: str, tile_mib: int) -> None:
    """K vectors a user, against the float64 oracle: duplicates, bonuses, filters and times at once."""
    torch.manual_seed(vectors)
    users, items = torch.randn(9, vectors, 7), torch.randn(120, 7)
    if kind == "ties":
        users, items = users.round(), items.round()
        items[60:90] = items[1:31]
        users[:, -1] = users[:, 0]
    if kind == "near":
        items = items[:1] * (1 + 1e-7 * torch.randn(120, 1))
    if kind == "odd":
        users[2, -1], users[3] = torch.nan, 2.0**70
        items[5], items[9, 2], items[11] = torch.nan, torch.inf, 0
    row, target = torch.randint(9, (30,)), torch.randint(1, 120, (30,))
    agree(users, items, row, target, tile_mib=tile_mib)
    own = torch.stack([torch.randperm(120)[:12] for _ in range(9)])
    extra: dict[str, Any] = {"own_ids_BN": own, "own_bonus_BN": torch.randn(own.shape).round()}
    extra |= {"exclude_ids_BN": torch.randint(0, 120, (9, 15))}
    agree(users, items, row, target, tile_mib=tile_mib, **extra)
    extra |= {"since_V": torch.randint(0, 9, (120,)), "time_C": torch.randint(0, 9, (30,))}
    agree(users, items, row, target, tile_mib=tile_mib, **extra)
    if vectors == 1:
        plain = target_rank(users[:, 0], items, row, target)
        assert all(map(torch.equal, plain, target_rank(users, items, row, target)))


def test_one_large_vector_of_several_keeps_the_bound() -> None:
    """The maximum of the K bounds is needed: a long vector that loses must not decide by a short one's."""
    torch.manual_seed(0)
    users = torch.randn(4, 3, 16)
    users[:, 1] *= 1e6
    users[:, 1] -= (users[:, 1] @ torch.ones(16))[:, None] / 16  # orthogonal to the direction of all items
    items = 1 + 1e-6 * torch.randn(300, 16)
    agree(users, items, torch.arange(4).repeat(5), torch.randint(1, 300, (20,)))


def test_users_without_a_vector_are_refused() -> None:
    zero = torch.zeros(1, dtype=torch.int64)
    with pytest.raises(ValueError, match="one vector or more"):
        target_rank(torch.zeros(1, 0, 3), torch.zeros(4, 3), zero, zero + 1)
