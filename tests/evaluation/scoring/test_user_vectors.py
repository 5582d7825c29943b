"""Top-k lists of all implementations agree with a full sort."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from findrec.datasets.folder.data_folder import DataFolder
from findrec.evaluation.scoring import blocks, inner_product
from findrec.evaluation.scoring.base import Query
from findrec.evaluation.scoring.baselines import Cooccurrence
from findrec.evaluation.scoring.candidates import Candidates
from findrec.evaluation.scoring.inner_product import InnerProductScorer
from findrec.evaluation.scoring.user_vectors import UserVectors
from findrec.evaluation.scoring.users import IntArray, UserBlock


class Plain(InnerProductScorer):
    name = "plain"

    def __init__(self, bonus: bool) -> None:
        torch.manual_seed(0)
        self.items_Vd = torch.randn(41, 5)
        self.users = torch.randn(30, 5)
        self.bonus = bonus

    def queries(self, block: UserBlock) -> UserVectors:
        users = self.users[torch.from_numpy(block.user)]
        own = block.padded_items()
        return UserVectors(users, own, 3.0 * torch.ones(own.shape)) if self.bonus else UserVectors(users)


@pytest.fixture
def block(folder: DataFolder) -> UserBlock:
    users: IntArray = np.arange(12)
    return UserBlock.read(folder, "test", users, 50)


def query_of(block: UserBlock, mask: bool) -> Query:
    return Query.of(block, Candidates(None), mask_seen=mask)


@pytest.mark.parametrize("bonus", [False, True])
@pytest.mark.parametrize("mask", [False, True])
@pytest.mark.parametrize("faiss", [False, True])
def test_vectors(
    block: UserBlock, bonus: bool, mask: bool, faiss: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    if not faiss:
        monkeypatch.setattr(inner_product, "import_faiss", lambda: None)
    scorer = Plain(bonus)
    ids, scores = scorer.rank(query_of(block, mask)).top(10)
    full = (scorer.users[:12] @ scorer.items_Vd.T).numpy()
    for b in range(12):
        known = sorted(set(block.item[block.offset[b] : block.offset[b + 1]].tolist()))
        full[b, known] += 3.0 if bonus else 0.0
        full[b, [0, *known] if mask else [0]] = -np.inf
        assert ids[b].tolist() == np.argsort(-full[b])[:10].tolist()
        assert scores[b].numpy() == pytest.approx(np.sort(full[b])[::-1][:10], abs=1e-5)


def test_faiss_is_used_for_inner_products(block: UserBlock) -> None:
    scorer = Plain(bonus=False)
    scorer.rank(query_of(block, False)).top(3)
    assert scorer._index.ntotal == 40


@pytest.mark.parametrize("mask", [False, True])
@pytest.mark.parametrize("tile_bytes", [1 << 20, 24 * 12 * 7])
def test_keys(
    folder: DataFolder, block: UserBlock, mask: bool, tile_bytes: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(blocks, "_TILE_BYTES", tile_bytes)
    scorer = Cooccurrence(folder)
    ids, scores = scorer.rank(query_of(block, mask)).top(10)
    full = scorer.score_block(block, 1, 41).astype(np.float32)
    for b in range(12):
        known = set(block.item[block.offset[b] : block.offset[b + 1]].tolist()) if mask else set()
        able = [i for i in range(1, 41) if i not in known]
        order = sorted(able, key=lambda i: (full[b, i - 1], scorer.popularity[i]), reverse=True)[:10]
        assert scores[b].tolist() == [full[b, i - 1] for i in order]
        keys = [(full[b, i - 1], scorer.popularity[i]) for i in ids[b].tolist()]
        assert keys == [(full[b, i - 1], scorer.popularity[i]) for i in order]
        assert not known & set(ids[b].tolist())


def test_short_catalogue_leaves_zeros(block: UserBlock) -> None:
    ids, _ = Plain(bonus=True).rank(query_of(block, True)).top(99)
    assert ids.shape == (12, 40)
    known = len(set(block.item[block.offset[0] : block.offset[1]].tolist()))
    assert int((ids[0] > 0).sum()) == 40 - known
