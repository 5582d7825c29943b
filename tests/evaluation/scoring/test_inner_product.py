"""Several vectors per user and signs: exact ranks and lists against brute-force scores."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import Tensor

from findrec.datasets.batches.batch import Batch
from findrec.datasets.folder.data_folder import DataFolder
from findrec.evaluation.index.index import IndexedScorer, build_index
from findrec.evaluation.protocol import RankingProtocol
from findrec.evaluation.ranking.evaluate import evaluate_scorers, rank_split
from findrec.evaluation.scoring.base import Query, Times
from findrec.evaluation.scoring.candidates import Candidates
from findrec.evaluation.scoring.inner_product import InnerProductScorer, make_queries
from findrec.evaluation.scoring.user_vectors import UserVectors
from findrec.evaluation.scoring.users import UserBlock
from findrec.models.base import Out

ITEMS, DIM = 40, 4


class Interests(InnerProductScorer):
    """K fixed vectors a user, small integers: many ties."""

    name = "interests"

    def __init__(self, vectors: int, *, bonus: bool = False, signs: Tensor | None = None) -> None:
        g = torch.Generator().manual_seed(vectors)
        self.items_Vd = torch.randint(-2, 3, (ITEMS + 1, DIM), generator=g).float()
        self.users = torch.randint(-2, 3, (100, vectors, DIM), generator=g).float()
        self.bonus, self.signs_d = bonus, signs

    def queries(self, block: UserBlock) -> UserVectors:
        users = self.users[torch.from_numpy(block.user)]
        if not self.bonus:
            return UserVectors(users)
        own = block.padded_items()
        return UserVectors(users, own, torch.ones(own.shape))

    def oracle(self, block: UserBlock) -> Tensor:
        """`[B, V + 1]` float64."""
        users = self.users[torch.from_numpy(block.user)].double()
        signs = torch.ones(DIM) if self.signs_d is None else self.signs_d
        scores = (users[:, :, None] * signs * self.items_Vd).sum(3).amax(1)
        if self.bonus:
            own = block.padded_items()
            scores.scatter_add_(1, own, torch.ones(own.shape).double())
        scores[:, 0] = -torch.inf
        return scores


def block_of(folder: DataFolder) -> UserBlock:
    return UserBlock.read(folder, "test", np.arange(12), 50)


@pytest.mark.parametrize("vectors", [1, 2, 4])
@pytest.mark.parametrize("bonus", [False, True])
@pytest.mark.parametrize("mask", [False, True])
@pytest.mark.parametrize("timed", [False, True])
@pytest.mark.parametrize("signed", [False, True])
def test_counts_and_lists_follow_from_all_scores(
    folder: DataFolder, vectors: int, bonus: bool, mask: bool, timed: bool, signed: bool
) -> None:
    signs = torch.tensor([-1.0, 1, 1, 1]) if signed else None
    scorer, block = Interests(vectors, bonus=bonus, signs=signs), block_of(folder)
    since = torch.randint(0, 9, (ITEMS + 1,), generator=torch.Generator().manual_seed(0))
    query = Query.of(block, Candidates(None), mask_seen=mask)
    if timed:
        cases = query.cases
        object.__setattr__(cases, "time", torch.arange(len(cases.time)) % 9)
        time_B = torch.zeros(len(block.user), dtype=torch.int64).scatter(0, cases.row, cases.time)
        query = Query(block, cases, query.seen_BM, since, Times(since, time_B))
    scores = scorer.oracle(block)
    ranking = scorer.rank(query)
    greater, equal = ranking.counts()
    ids, listed = ranking.top(10)
    tied = 0
    for c, (b, target) in enumerate(zip(query.cases.row.tolist(), query.cases.target.tolist(), strict=True)):
        able = set(range(1, ITEMS + 1))
        if mask:
            able -= set(block.padded_items()[b].tolist())
        if timed:
            able &= set((since <= query.cases.time[c]).nonzero()[:, 0].tolist())
        rivals = scores[b, sorted(able - {target})]
        assert int(greater[c]) == int((rivals > scores[b, target]).sum())
        assert int(equal[c]) == int((rivals == scores[b, target]).sum())
        tied += int(equal[c])
        first = scores[b, sorted(able)].sort(descending=True).values[:10]
        count = len(first)
        assert listed[b, :count].tolist() == first.tolist()
        assert (ids[b, count:] == 0).all()
        assert set(ids[b, :count].tolist()) <= able
        assert [float(scores[b, v]) for v in ids[b, :count].tolist()] == first.tolist()
    assert tied > 2, "the data should have ties"


def test_a_sign_makes_a_lorentzian_product(folder: DataFolder) -> None:
    """Distances on the hyperboloid fall as the Minkowski product rises: the nearest item ranks first."""
    torch.manual_seed(0)
    scorer = Interests(1, signs=torch.tensor([-1.0, 1, 1, 1]))
    for points in (scorer.items_Vd, scorer.users):
        points[..., 1:] = torch.randn(points[..., 1:].shape)
        points[..., 0] = (1 + points[..., 1:].square().sum(-1)).sqrt()
    block = block_of(folder)
    ids, _ = scorer.rank(Query.of(block, Candidates(None), mask_seen=False)).top(ITEMS)
    users, items = scorer.users[torch.from_numpy(block.user), 0].double(), scorer.items_Vd.double()
    minkowski = users[:, :1] * items[:, 0] - users[:, 1:] @ items[:, 1:].T
    distance = minkowski.clamp(min=1).acosh()[:, 1:]
    assert torch.equal(ids, distance.argsort(dim=1) + 1)


def test_a_single_vector_of_k_equals_one_vector(folder: DataFolder) -> None:
    several = Interests(1, bonus=True)
    single = Interests(1, bonus=True)
    single.users = single.users[:, 0]
    protocol = RankingProtocol(users_per_block=7, mask_seen=True, ks=[5])
    actual = [evaluate_scorers([scorer], folder, protocol) for scorer in (several, single)]
    assert actual[0].rows == actual[1].rows


def test_an_index_uses_exact_search_for_several_vectors(folder: DataFolder) -> None:
    scorer, block = Interests(3, bonus=True), block_of(folder)
    indexed = IndexedScorer(scorer, build_index(scorer.items_Vd, "Flat"))
    query = Query.of(block, Candidates(None), mask_seen=True)
    assert torch.equal(indexed.rank(query).top(10)[1], scorer.rank(query).top(10)[1])
    assert indexed.index.num_exact == 12
    assert all(map(torch.equal, indexed.rank(query).counts(), scorer.rank(query).counts()))


def test_several_vectors_do_not_depend_on_blocks(folder: DataFolder) -> None:
    scorer = Interests(3, bonus=True)
    actual = [rank_split(scorer, folder, "test", RankingProtocol(users_per_block=n)) for n in (1, 5, 100)]
    assert all(np.array_equal(one.to_array(), actual[0].to_array()) for one in actual)


def test_a_models_vectors_become_queries(folder: DataFolder) -> None:
    batch: Batch = block_of(folder).batch
    queries = make_queries(Out(torch.randn(12, 3, DIM)), batch)
    assert queries.users_Bd.shape == (12, 3, DIM)
    assert not queries.is_plain
