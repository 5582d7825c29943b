"""Exact lists equal a float64 sort with ties by id, for all tiles and parts."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from torch import Tensor

from findrec.evaluation.search.exact_top import Tiles, best, exact_top, with_specials
from findrec.ops.ranking._rank_special import Specials
from findrec.ops.ranking._rank_torch import grid64
from findrec.ops.ranking.item_rows import TensorRows
from findrec.ops.ranking.rules import Rules


def tiles_of(items: Tensor, lo: int, hi: int, step: int) -> Tiles:
    """The items lo..hi-1 in pieces that overwrite one another, as those of a file do."""

    def tiles() -> Iterator[tuple[int, Tensor]]:
        spare = torch.empty(step, items.shape[1])
        for a in range(lo, hi, step):
            some = items[a : min(a + step, hi)]
            spare[: len(some)] = some
            yield a, spare[: len(some)]
            spare.fill_(torch.nan)

    return tiles


def sorted_lists(scores: Tensor, k: int) -> list[list[int]]:
    """Ids by falling score, then by id; what has no score is 0."""
    lists = []
    for row in scores.tolist():
        ids = [v for v in range(1, len(row)) if row[v] == row[v] and row[v] != -torch.inf]
        ids = sorted(ids, key=lambda v, row=row: (-row[v], v))[:k]
        lists.append(ids + [0] * (min(k, len(row) - 1) - len(ids)))
    return lists


def make(kind: str) -> tuple[Tensor, Tensor]:
    torch.manual_seed(0)
    users, items = torch.randn(7, 6), torch.randn(301, 6)
    if kind == "ties":
        users, items = users.round(), items.round()
    if kind == "near":
        items = items[0] * (1 + 1e-7 * torch.randn(301, 1))
    if kind == "constant":
        users[:] = 0
    if kind == "odd":
        items[5], items[9, 2], items[11, 0], users[3] = torch.nan, torch.inf, -torch.inf, torch.nan
        users[4] = 2.0**70
    return users, items


@pytest.mark.parametrize("kind", ["plain", "ties", "near", "constant", "odd"])
@pytest.mark.parametrize("k", [1, 10, 300])
def test_lists_equal_a_sort(kind: str, k: int) -> None:
    users, items = make(kind)
    expected = sorted_lists(grid64(users, items), k)
    for step in (1 << 9, 100, 7):
        ids, scores = exact_top(users, tiles_of(items, 1, 301, step), k)
        assert ids.tolist() == expected
        assert ((scores == -torch.inf) == (ids == 0)).all()
    parts = [exact_top(users, tiles_of(items, lo, hi, 64), k) for lo, hi in [(1, 2), (2, 190), (190, 301)]]
    merged = best((torch.cat([p[0] for p in parts], 1), torch.cat([p[1] for p in parts], 1)), k)
    assert merged[0].tolist() == expected


@pytest.mark.parametrize("kind", ["plain", "ties", "odd"])
def test_bonus_excluded_and_unavailable_items(kind: str) -> None:
    users, items = make(kind)
    own, out = torch.randint(0, 301, (7, 12)), torch.randint(0, 301, (7, 20))
    bonus = torch.randn(7, 12)
    since, time = torch.randint(0, 9, (301,)), torch.arange(7)
    scores = grid64(users, items)
    for b in range(7):
        met: set[int] = set()
        for v, extra in zip(own[b].tolist(), bonus[b].double(), strict=True):
            if v and v not in met:
                scores[b, v] += extra
                met.add(v)
        scores[b, out[b][out[b] > 0]] = -torch.inf
        scores[b, since > time[b]] = -torch.inf
    special = Specials.of(7, 300, Rules(own, bonus, out), users.device)
    special = special.there(since[special.item] <= time[special.row])
    top = exact_top(users, tiles_of(items, 1, 301, 50), 10 + 32, since_V=since, time_B=time)
    ids, _ = with_specials(top, users, TensorRows(items), special, 10)
    assert ids.tolist() == sorted_lists(scores, 10)


@pytest.mark.parametrize("kind", ["plain", "ties", "near", "odd"])
@pytest.mark.parametrize("k", [1, 10, 300])
def test_lists_of_several_vectors_use_the_largest_score(kind: str, k: int) -> None:
    users, items = make(kind)
    users = torch.stack([users, users.roll(1, dims=1), -users], dim=1)
    want = sorted_lists(grid64(users, items), k)
    for step in (7, 300):
        ids, _ = exact_top(users, tiles_of(items, 1, 301, step), k)
        assert ids.tolist() == want
