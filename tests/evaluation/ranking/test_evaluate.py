"""Ranking a split: scorers with known results, and invariance of the results."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
from numpy.typing import NDArray
from small_models import make_model
from torch import Tensor

from findrec.datasets.batches.catalogue import Catalogue
from findrec.datasets.folder.data_folder import DataFolder
from findrec.datasets.folder.in_memory import write_data_folder
from findrec.evaluation.metrics.metrics import Ranks
from findrec.evaluation.protocol import RankingProtocol
from findrec.evaluation.ranking.evaluate import evaluate_scorers, rank_split, summarise, write_results
from findrec.evaluation.scoring.base import Scorer
from findrec.evaluation.scoring.baselines import Cooccurrence, OwnFrequent, Popularity
from findrec.evaluation.scoring.blocks import BlockScorer, order_keys
from findrec.evaluation.scoring.inner_product import InnerProductScorer, ModelScorer
from findrec.evaluation.scoring.user_vectors import UserVectors
from findrec.evaluation.scoring.users import IntArray, UserBlock
from findrec.models.parts.repeat import repeat_candidates
from findrec.ops.repeat_bonus import repeat_features_of_history


class Fixed(BlockScorer):
    """The same score for every user; no ties by popularity."""

    name = "fixed"

    def __init__(self, scores: NDArray[np.float64]) -> None:
        self.scores = scores
        self.popularity = np.zeros(len(scores), dtype=np.int64)

    def score_block(self, block: UserBlock, lo: int, hi: int) -> NDArray[np.float64]:
        return np.tile(self.scores[lo:hi], (len(block.user), 1))


class Clairvoyant(BlockScorer):
    """Gives the targets themselves."""

    name = "clairvoyant"

    def __init__(self, num_items: int) -> None:
        self.popularity = np.zeros(num_items + 1, dtype=np.int64)

    def score_block(self, block: UserBlock, lo: int, hi: int) -> NDArray[np.float64]:
        scores = np.zeros((len(block.user), len(self.popularity)))
        scores[block.cases.row.numpy(), block.cases.target.numpy()] = 1
        return scores[:, lo:hi]


class Vectors(InnerProductScorer):
    """Fixed vectors: the user's is the sum of its history's items, with a bonus for those items."""

    name = "vectors"

    def __init__(self, items: Tensor, bonus: float | None) -> None:
        self.items_Vd = items
        self.bonus = bonus

    def queries(self, block: UserBlock) -> UserVectors:
        users = torch.zeros(len(block.user), self.items_Vd.shape[1])
        for b in range(len(block.user)):
            for item in block.item[block.offset[b] : block.offset[b + 1]]:
                users[b] += self.items_Vd[item]
        if self.bonus is None:
            return UserVectors(users)
        own = block.padded_items()
        return UserVectors(users, own, torch.full(own.shape, self.bonus))


def rank_all(scorer: Scorer, folder: DataFolder, block: int = 8, mask: bool = False, **extra: int) -> Ranks:
    return rank_split(
        scorer, folder, "test", RankingProtocol(users_per_block=block, max_length=50, mask_seen=mask), **extra
    )


def test_constant_scorer_is_in_the_middle(folder: DataFolder) -> None:
    ranks = rank_all(Fixed(np.ones(41)), folder)
    assert (ranks.rank == (folder.num_items + 1) / 2).all()
    assert rank_all(Fixed(np.full(41, np.nan)), folder).rank.tolist() == ranks.rank.tolist()


def test_oracle_scorer_is_perfect(folder: DataFolder) -> None:
    row = summarise(rank_all(Clairvoyant(40), folder), folder, "test", RankingProtocol(ks=[5]), model="m")
    assert row["ndcg@5"] == row["recall@5"] == row["mrr"] == row["auc"] == row["mean_rank"] == 1


def test_random_scorer_is_at_chance(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    histories = rng.integers(1, 51, (800, 4)).tolist()
    wide = write_data_folder(tmp_path / "wide", histories, num_items=50)
    torch.manual_seed(0)
    row = summarise(
        rank_all(Vectors(torch.randn(51, 1), None), wide), wide, "test", RankingProtocol(ks=[10]), model="m"
    )
    assert abs(row["recall@10"] - 0.2) < 4 * row["recall@10_se"]
    assert abs(row["mean_rank"] - 25.5) < 4 * row["mean_rank_se"]


@pytest.mark.parametrize("mask", [False, True])
def test_results_do_not_depend_on_blocks_and_workers(folder: DataFolder, mask: bool) -> None:
    torch.manual_seed(0)
    scorers: list[Scorer] = [Vectors(torch.randn(41, 4), 0.5), Cooccurrence(folder), OwnFrequent(folder)]
    for scorer in scorers:
        whole = rank_all(scorer, folder, mask=mask, list_k=5)
        assert sorted(whole.user.tolist()) == whole.user.tolist()
        for block in (1, 3, 100):
            assert np.array_equal(rank_all(scorer, folder, block, mask).to_array(), whole.to_array())
        for world in (2, 3):
            parts = [rank_all(scorer, folder, mask=mask, list_k=5, rank=r, world=world) for r in range(world)]
            joined = Ranks.concat(parts)
            assert np.array_equal(joined.to_array(), whole.to_array())
            assert np.array_equal(joined.lists, whole.lists)


def test_renaming_items_changes_nothing(
    folder: DataFolder, histories: list[list[int]], tmp_path: Path
) -> None:
    new = np.concatenate([[0], 1 + np.random.default_rng(3).permutation(40)])  # new[old id]
    renamed = write_data_folder(tmp_path / "renamed", [new[h].tolist() for h in histories], num_items=40)
    torch.manual_seed(1)
    items = torch.randn(41, 4)
    moved = torch.zeros_like(items)
    moved[torch.from_numpy(new)] = items
    pairs: list[tuple[Scorer, Scorer]] = [
        (Vectors(items, 1.0), Vectors(moved, 1.0)),
        (Popularity(folder), Popularity(renamed)),
        (OwnFrequent(folder), OwnFrequent(renamed)),
        (Cooccurrence(folder), Cooccurrence(renamed)),
    ]
    for one, two in pairs:
        assert np.array_equal(rank_all(one, folder).rank, rank_all(two, renamed).rank)


def test_seen_filter_never_removes_the_target(folder: DataFolder, histories: list[list[int]]) -> None:
    """Popular items score highest; without the seen ones the target moves up by exactly those above it."""
    scorer = Fixed(-np.arange(41.0))
    kept, removed = rank_all(scorer, folder), rank_all(scorer, folder, mask=True)
    repeats = 0
    for user, target, before, after in zip(
        kept.user, kept.target, kept.greater, removed.greater, strict=True
    ):
        known = set(histories[user][:-1])
        repeats += target in known
        assert before == target - 1
        assert after == before - len([i for i in known if i < target])
    assert repeats > 5, "the data should have targets among the seen items"


def test_model_scorer_is_inner_product_plus_repeat_bonus(folder: DataFolder) -> None:
    torch.manual_seed(0)
    model = make_model({"name": "sasrec", "dim": 8, "layers": 1, "heads": 1}, {"text": 6})
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.3 * torch.randn_like(parameter))
    table = torch.randn(41, 8)
    scorer = ModelScorer(model, table, Catalogue(folder, ["text"]), max_length=20, device="cpu", name="model")
    users: IntArray = np.arange(6)
    block = UserBlock.read(folder, "test", users, 20)
    queries = scorer.queries(block)
    assert queries.own_ids_BN is not None
    assert queries.own_bonus_BN is not None
    assert not model.training
    with torch.no_grad():
        features = {"text": folder.feature("text").rows(block.batch.ids)}
        out = model(block.batch, table[block.batch.ids], features)
    assert out.repeat is not None
    own = repeat_candidates(block.batch)
    num_candidates = own.ids_PN.shape[1]
    phi_TNR, seen_TN = repeat_features_of_history(
        own.rank_PE, own.row_T, own.step_T, num_candidates=num_candidates, window=own.window
    )
    score = (out.h.double() @ table.double().T).numpy()
    for t in range(6):
        for n in range(num_candidates):
            if seen_TN[t, n]:
                score[t, own.ids_PN[own.row_T[t], n]] += float(phi_TNR[t, n] @ out.repeat[t])
    assert np.abs(queries.own_bonus_BN.numpy()).max() > 0.1
    actual = rank_split(
        scorer, folder, "test", RankingProtocol(users_per_block=6, max_length=20, mask_seen=False)
    )
    for user, target, greater in zip(actual.user, actual.target, actual.greater, strict=True):
        if user < 6:
            others = np.delete(score[user, 1:], target - 1)
            assert greater == (others > score[user, target]).sum()


def test_order_keys_sort_by_score_then_popularity() -> None:
    scores = np.array([[-np.inf, -2.5, -1e-40, -0.0, 0.0, 1e-40, 1.0, 1.0, np.inf, np.nan]])
    popularity = np.array([3, 0, 0, 5, 1, 0, 1, 2, 0, 3])
    keys = order_keys(scores, popularity)[0].tolist()
    assert sorted(range(10), key=keys.__getitem__) in (
        [0, 9, 1, 2, 4, 3, 5, 6, 7, 8],
        [9, 0, 1, 2, 4, 3, 5, 6, 7, 8],
    )
    assert keys[0] == keys[9]


def test_results_are_written_completely_and_deterministically(folder: DataFolder, tmp_path: Path) -> None:
    texts = []
    for _ in range(2):
        rows, ranks = evaluate_scorers(
            [Popularity(folder), OwnFrequent(folder)], folder, RankingProtocol(ks=[5, 10], users_per_block=16)
        )
        write_results(tmp_path, rows, ranks, folder)
        texts.append((tmp_path / "metrics.json").read_bytes() + (tmp_path / "ranks.parquet").read_bytes())
    assert texts[0] == texts[1]
    assert sorted(p.name for p in tmp_path.iterdir()) == ["metrics.json", "ranks.parquet"]
    saved = json.loads((tmp_path / "metrics.json").read_text())
    assert [row["model"] for row in saved["test"]] == ["popularity", "own_frequent"]
    assert {"model", "protocol", "users", "items", "ndcg@10", "recall@10", "mrr", "coverage@10"} <= set(
        saved["valid"][0]
    )
    assert {row["model"] for row in saved["strata"]} == {"popularity", "own_frequent"}
    table = pq.read_table(tmp_path / "ranks.parquet")
    assert table.column_names == ["model", "split", "user", "target", "greater", "equal", "rank"]
    kept = table.filter(
        [
            a and b
            for a, b in zip(
                (m == "popularity" for m in table["model"].to_pylist()),
                (s == "test" for s in table["split"].to_pylist()),
                strict=True,
            )
        ]
    )
    rank = kept["rank"].to_numpy()
    assert np.mean(rank <= 10) == pytest.approx(saved["test"][0]["recall@10"])
