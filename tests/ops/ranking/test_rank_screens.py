"""Every screen gives the counts of plain float64 scoring, and what ranks must be whatever the vectors."""

from __future__ import annotations

from typing import Any, Literal

import pytest
import torch
from torch import Tensor

from findrec.ops.ranking._rank_cpp import cpp_count
from findrec.ops.ranking.rules import Rules
from findrec.ops.ranking.target_rank import dot64, target_rank

COMPILED: tuple[Literal["int16", "float32"], ...] = ("int16", "float32")


def cases(num_users: int, num_items: int, count: int) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    row = torch.randint(0, num_users, (count,), generator=generator)
    return row, torch.randint(1, num_items + 1, (count,), generator=generator)


@pytest.mark.parametrize("impl", [*COMPILED, "torch", "bfloat16"])
@pytest.mark.parametrize(
    ("num_users", "num_items", "width"),
    [(1, 1, 1), (7, 33, 17), (13, 4100, 3), (61, 1000, 130), (5, 65, 2500)],
)
def test_every_screen_gives_the_counts_of_plain_scoring(
    num_users: int, num_items: int, width: int, impl: str
) -> None:
    """Odd sizes, several cases a user, norms from 1e-3 to 1e3, one-sided and near-equal vectors."""
    torch.manual_seed(num_items)
    users, items = torch.randn(num_users, width), torch.randn(num_items + 1, width)
    items *= 10 ** (6 * torch.rand(num_items + 1, 1) - 3)
    items[1::7, 0] = 300.0  # a single coordinate makes up the vector
    items[2::9] = items[-1] * (1 + 1e-7 * torch.randn(len(items[2::9]), 1))
    users[::3] *= 1e-4
    row, target = cases(num_users, num_items, 3 * num_users)
    extra: dict[str, Any] = {}
    if num_items % 2:
        extra = {"since_V": torch.randint(0, 9, (num_items + 1,)), "time_C": torch.randint(0, 9, row.shape)}
    expected = target_rank(users, items, row, target, impl="exact", rules=Rules(**extra))
    result = target_rank(users, items, row, target, impl=impl, rules=Rules(**extra))  # type: ignore[arg-type]
    assert all(torch.equal(a, b) for a, b in zip(expected, result, strict=True))


def test_millions_of_pairs() -> None:
    """4.2 million pairs, targets from the first to the last rank; the screens decide nearly all."""
    torch.manual_seed(11)
    users, items = torch.randn(210, 16), torch.randn(20_001, 16)
    items[5001:5051] = items[1:51]
    grid = torch.zeros(210, 20_000, dtype=torch.float64)
    for k in range(16):
        grid.addcmul_(users[:, k : k + 1].double(), items[1:, k].double())
    row = torch.arange(210)
    target = 1 + torch.stack([grid[b].kthvalue(1 + 95 * b).indices for b in range(210)])
    t = dot64(users, items, row, target)
    expected = (grid > t[:, None]).sum(1), (grid == t[:, None]).sum(1) - 1
    for impl in COMPILED:
        result = target_rank(users, items, row, target, impl=impl)
        assert all(torch.equal(a, b) for a, b in zip(expected, result, strict=True))
        _, _, doubtful = cpp_count(users, items[1:], torch.arange(211), t, kind=impl)
        assert 210 <= doubtful < 210 * 20_000 // 100  # its target is in doubt for every user


@pytest.mark.parametrize("impl", COMPILED)
def test_the_bound_is_needed_and_enough(impl: str) -> None:
    """Scores spread so closely around the target's that the screen's own order of them is wrong."""
    torch.manual_seed(12)
    base = torch.randn(64)
    for spread in (1e-7, 1e-6, 1e-5, 1e-4, 1e-3):
        items = base * (1 + spread * torch.randn(800, 1)) + spread * torch.randn(800, 64)
        users = torch.cat([base + 0.1 * torch.randn(3, 64), -base[None]])
        row, target = cases(4, 799, 40)
        expected = target_rank(users, items, row, target, impl="exact")
        result = target_rank(users, items, row, target, impl=impl)  # type: ignore[arg-type]
        assert all(torch.equal(a, b) for a, b in zip(expected, result, strict=True))


def test_threads_and_views_change_nothing() -> None:
    torch.manual_seed(13)
    wide = torch.randn(3001, 48)
    users, items = torch.randn(50, 24), wide[:, 8:32]  # rows are not dense
    row, target = cases(50, 3000, 200)
    before = torch.get_num_threads()
    result = []
    try:
        for threads in (1, 2, 5):
            torch.set_num_threads(threads)
            result += [target_rank(users, vectors, row, target) for vectors in (items, items.clone())]
    finally:
        torch.set_num_threads(before)
    assert all(torch.equal(a, b) for one in result[1:] for a, b in zip(result[0], one, strict=True))


def test_without_a_compiler_the_slower_form_is_taken_and_announced(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    users, items = torch.randn(3, 4), torch.randn(9, 4)
    row, target = cases(3, 8, 5)
    expected = target_rank(users, items, row, target)
    monkeypatch.setattr("findrec.ops.ranking.item_rows.cpp_rank_problem", lambda: "no compiler at hand")
    result = target_rank(users, items, row, target)
    assert all(torch.equal(a, b) for a, b in zip(expected, result, strict=True))
    printed = capsys.readouterr()
    assert "no compiler at hand" in printed.out + printed.err
    with pytest.raises(ValueError, match="no compiler at hand"):
        target_rank(users, items, row, target, impl="int16")
    with pytest.raises(ValueError, match="unknown"):
        target_rank(users, items, row, target, impl="int8")  # type: ignore[arg-type]


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.float16, torch.int16])
def test_stored_vectors_are_float32(dtype: torch.dtype) -> None:
    users, items, zero = torch.ones(2, 3), torch.ones(5, 3), torch.zeros(1, dtype=torch.int64)
    with pytest.raises(ValueError, match="float32"):
        target_rank(users, items.to(dtype), zero, zero + 1)
    with pytest.raises(ValueError, match="float32"):
        target_rank(users.to(dtype), items, zero, zero + 1)


@pytest.mark.parametrize("impl", ["auto", "torch"])
def test_renaming_items_moves_no_rank(impl: str) -> None:
    torch.manual_seed(14)
    users, items = torch.randn(9, 5).round(), torch.randn(200, 5).round()  # many ties
    row, target = cases(9, 199, 60)
    new = torch.cat([torch.zeros(1, dtype=torch.int64), 1 + torch.randperm(199)])
    moved = torch.empty_like(items)
    moved[new] = items
    one = target_rank(users, items, row, target, impl=impl)  # type: ignore[arg-type]
    other = target_rank(users, moved, row, new[target], impl=impl)  # type: ignore[arg-type]
    assert int(one[1].sum()) > 0
    assert all(torch.equal(a, b) for a, b in zip(one, other, strict=True))


def test_ranks_of_random_scores_are_uniform() -> None:
    """P(rank <= k) = k / V for a scorer that knows nothing, ties or not: every rank is met equally often."""
    torch.manual_seed(15)
    for levels in (0, 3):
        users, items = torch.randn(4000, 4), torch.randn(101, 4)
        if levels:
            items = torch.randint(0, levels, (101, 4)).float()  # about one item in 81 has its like
        row = torch.arange(4000)
        greater, equal = target_rank(users, items, row, torch.randint(1, 101, (4000,)))
        rank = 1 + greater + equal / 2
        assert abs(float(rank.mean()) - 50.5) < 4 * 28.9 / 4000**0.5
        assert abs(float((rank <= 20).double().mean()) - 0.2) < 4 * 0.4 / 4000**0.5 + 0.01 * bool(levels)
