"""Re-rankers: every rank follows from the base scorer's ranking and the new scores, case by case."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from torch import Tensor

from findrec.datasets.folder.data_folder import DataFolder
from findrec.evaluation.protocol import RankingProtocol
from findrec.evaluation.ranking.evaluate import rank_split
from findrec.evaluation.scoring.base import UNKNOWN, Query, Scorer, Top
from findrec.evaluation.scoring.blocks import BlockScorer
from findrec.evaluation.scoring.candidates import Candidates
from findrec.evaluation.scoring.lists import ListScorer
from findrec.evaluation.scoring.rerank import ReRanker
from findrec.evaluation.scoring.users import UserBlock

ITEMS = 40


class Base(BlockScorer):
    """One score an item for all users: `step` items tie."""

    name = "base"

    def __init__(self, step: int) -> None:
        self.popularity = np.zeros(ITEMS + 1, dtype=np.int64)
        self.scores = -np.floor(np.arange(ITEMS + 1.0) / step)

    def score_block(self, block: UserBlock, lo: int, hi: int) -> NDArray[np.float64]:
        return np.tile(self.scores[lo:hi], (len(block.user), 1))


class Fixed(ReRanker):
    """New scores of items from a table; NaN among them."""

    def __init__(self, base: Scorer, first: int) -> None:
        super().__init__(base, first, "fixed")
        self.new = torch.randint(0, 6, (ITEMS + 1,), generator=torch.Generator().manual_seed(3)).double()
        self.new[5] = torch.nan

    def rescore(self, query: Query, ids_BN: Tensor) -> Tensor:
        return self.new[ids_BN]


def expected(scorer: Fixed, scores: NDArray[np.float64], listed: list[int], target: int, able: set[int]):
    """`(greater, equal)` by the rules of the module, from the base scores of the items that compete."""
    new = scorer.new.nan_to_num(nan=-torch.inf)
    above = sum(scores[v] > scores[target] for v in able - {target})
    level = sum(scores[v] == scores[target] for v in able - {target})
    rivals = [v for v in listed if v != target]
    if target in listed or above + level < scorer.first:
        if target not in listed:
            rivals = rivals[: scorer.first - 1]
        return sum(new[v] > new[target] for v in rivals), sum(new[v] == new[target] for v in rivals)
    moved = sum(scores[v] <= scores[target] for v in listed)
    return above + moved, level - moved


@pytest.mark.parametrize("step", [1, 3, 50])
@pytest.mark.parametrize("first", [1, 7, 39, 60])
@pytest.mark.parametrize("mask", [False, True])
def test_ranks_follow_from_the_list_and_the_base(
    folder: DataFolder, step: int, first: int, mask: bool
) -> None:
    scorer = Fixed(Base(step), first)
    block = UserBlock.read(folder, "test", np.arange(12), 50)
    query = Query.of(block, Candidates(None), mask_seen=mask)
    ranking = scorer.rank(query)
    greater, equal = ranking.counts()
    base_lists = scorer.base.rank(query).top(first)[0]
    ids, _ = ranking.top(first)
    for c, (b, target) in enumerate(zip(query.cases.row.tolist(), query.cases.target.tolist(), strict=True)):
        able = set(range(1, ITEMS + 1)) - (set(block.padded_items()[b].tolist()) if mask else set())
        listed = [v for v in base_lists[b].tolist() if v]
        want = expected(scorer, scorer.base.scores, listed, target, able)  # type: ignore[attr-defined]
        assert (int(greater[c]), int(equal[c])) == tuple(int(n) for n in want)
        again = sorted(listed, key=lambda v: -float(scorer.new[v].nan_to_num(nan=-torch.inf)))
        assert ids[b, : len(again)].tolist() == again
        assert set(ids[b, len(again) :].tolist()) <= {0}


def test_the_base_order_follows_the_new_order(folder: DataFolder) -> None:
    scorer = Fixed(Base(1), 10)
    block = UserBlock.read(folder, "test", np.arange(3), 50)
    ids, _ = scorer.rank(Query.of(block, Candidates(None), mask_seen=False)).top(25)
    for row in ids.tolist():
        assert sorted(row[:10]) == list(range(1, 11))
        assert row[10:] == list(range(11, 26))


def test_unchanged_scores_keep_the_ranking(folder: DataFolder) -> None:
    """A re-ranker that scores as its base does is its base, wherever the list ends (no ties)."""
    protocol = RankingProtocol(users_per_block=7, mask_seen=True)
    base = Base(1)
    whole = rank_split(base, folder, "test", protocol, list_k=8)
    for first in (1, 8, 20, 40):
        scorer = Fixed(base, first)
        scorer.new = torch.from_numpy(base.scores)
        for users in (3, 100):
            actual = rank_split(
                scorer, folder, "test", RankingProtocol(users_per_block=users, mask_seen=True), list_k=8
            )
            assert np.array_equal(actual.to_array(), whole.to_array())
            assert np.array_equal(actual.lists, whole.lists)


class Lists(ListScorer):
    name, list_limit = "lists", 9

    def generate(self, query: Query) -> Top:
        ids = torch.arange(1, 10).repeat(len(query.block.user), 1)
        return ids, -ids.double()


def test_ranks_outside_of_base_lists_are_unknown(folder: DataFolder) -> None:
    scorer = Fixed(Lists(), 20)
    assert (scorer.first, scorer.list_limit) == (9, 9)
    ranks = rank_split(scorer, folder, "test", RankingProtocol(), list_k=50)
    assert ranks.limit == 9
    assert ((ranks.greater == UNKNOWN) == (ranks.target > 9)).all()
    assert (ranks.greater[ranks.target <= 9] >= 0).all()
    assert ranks.lists.shape[1] == 10


def test_an_empty_list_is_refused() -> None:
    with pytest.raises(ValueError, match="at least one item"):
        Fixed(Base(1), 0)
