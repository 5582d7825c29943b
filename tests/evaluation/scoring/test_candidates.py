"""Candidates available at the target's time, against brute-force counts."""

from __future__ import annotations

from itertools import product
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from small_models import make_model
from torch import Tensor

from findrec.baseline_configs import BASELINES
from findrec.datasets.batches.catalogue import Catalogue
from findrec.datasets.batches.evaluation import Part, evaluated_users
from findrec.datasets.folder.data_folder import ALWAYS, NEVER, DataFolder
from findrec.datasets.folder.in_memory import write_data_folder
from findrec.datasets.folder.splits import Split
from findrec.errors import FindRecError
from findrec.evaluation.display.wording import sample_recommendations
from findrec.evaluation.metrics.metrics import Ranks, summarise
from findrec.evaluation.protocol import RankingProtocol
from findrec.evaluation.ranking.evaluate import evaluate_scorers, rank_split
from findrec.evaluation.scoring.base import Query, Scorer
from findrec.evaluation.scoring.baselines import make_baseline
from findrec.evaluation.scoring.blocks import BlockScorer
from findrec.evaluation.scoring.candidates import Candidates, Rule, candidate_counts
from findrec.evaluation.scoring.inner_product import InnerProductScorer, ModelScorer
from findrec.evaluation.scoring.users import UserBlock

NUM_ITEMS, GONE = 30, [7, 30]


@pytest.fixture(scope="module", params=["leave_one_out", "global_temporal"])
def folder(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> DataFolder:
    """Item v is new on day v // 3; two items are gone, few have no event at all."""
    rng = np.random.default_rng(5)
    histories, times = [], []
    for _ in range(25):
        when = np.sort(rng.integers(1, 12, size=int(rng.integers(4, 12))))
        histories.append(
            [int(rng.choice([v for v in range(1, 3 * t + 1) if v <= 29 and v != 7])) for t in when]
        )
        times.append((when * 100).tolist())
    split = (
        Split()
        if request.param == "leave_one_out"
        else Split(kind="global_temporal", valid_from=500, test_from=800)
    )
    features = rng.standard_normal((NUM_ITEMS, 5)).astype(np.float32)
    path: Path = tmp_path_factory.mktemp("data") / "small"
    write_data_folder(path, histories, times, features={"text": features}, num_items=NUM_ITEMS, split=split)
    items = pq.read_table(path / "items.parquet")
    gone = pa.array([v in GONE for v in range(1, NUM_ITEMS + 1)])
    pq.write_table(items.append_column("gone", gone), path / "items.parquet")
    return DataFolder.open(path, verify=False)


def scorers(folder: DataFolder) -> list[Scorer]:
    torch.manual_seed(0)
    model = make_model({"name": "sasrec", "dim": 8, "layers": 1, "heads": 1})
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.3 * torch.randn_like(parameter))
    trained = ModelScorer(
        model, torch.randn(NUM_ITEMS + 1, 8), Catalogue(folder, []), 20, "cpu", name="model"
    )
    plain = ("popularity", "cooccurrence", "own_frequent", "text_knn")
    return [trained, *(make_baseline(BASELINES[name](name=name), folder) for name in plain)]


def values(scorer: Scorer, block: UserBlock) -> list[list[float]]:
    """What each user's items 1..V are compared by; 0 for padding."""
    if isinstance(scorer, BlockScorer):
        return [[0, *row] for row in scorer.keys(block, 1, NUM_ITEMS + 1).tolist()]
    assert isinstance(scorer, InnerProductScorer)
    queries = scorer.queries(block)
    users, items = queries.users_Bd.double(), scorer.items_Vd.double()
    score: Tensor = torch.zeros(len(users), len(items), dtype=torch.float64)
    for k in range(users.shape[1]):
        score += users[:, k : k + 1] * items[:, k]
    if queries.own_ids_BN is not None and queries.own_bonus_BN is not None:
        score.scatter_add_(1, queries.own_ids_BN, queries.own_bonus_BN.double())
    return score.tolist()


LISTED = [v for v in range(1, NUM_ITEMS + 1) if v % 3 and v != 11]
RULES = ["all", "available", "file:list.txt", ("available", "file:list.txt")]


@pytest.fixture(autouse=True)
def stock(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FINDREC_HOME", str(tmp_path))
    (tmp_path / "list.txt").write_text("\n".join(map(str, LISTED)))


@pytest.mark.parametrize("rule", [*RULES[:2], RULES[3]])
@pytest.mark.parametrize("mask", [False, True])
@pytest.mark.parametrize("split", ["valid", "test"])
def test_ranks_and_lists_equal_brute_force(folder: DataFolder, split: Part, mask: bool, rule: Rule) -> None:
    users = evaluated_users(folder, split)
    block = UserBlock.read(folder, split, users, 20)
    first_event = {int(v): NEVER for v in range(1, NUM_ITEMS + 1)}
    for user in range(folder.num_users):
        whole = folder.histories([user])
        for item, time in zip(whole.item.tolist(), whole.timestamp.tolist(), strict=True):
            first_event[item] = min(first_event[item], time)
    first_event = {v: ALWAYS if time == NEVER else time for v, time in first_event.items()}
    left_out = 0
    for scorer in scorers(folder):
        value = values(scorer, block)
        actual = rank_split(
            scorer,
            folder,
            split,
            RankingProtocol(users_per_block=7, max_length=20, mask_seen=mask, candidates=rule),
            list_k=6,
        )
        expected, lists, answered = [], [], []
        for b, user in enumerate(users.tolist()):
            past = set(block.item[block.offset[b] : block.offset[b + 1]].tolist())
            start = int(folder.valid_start[user] if split == "valid" else folder.test_start[user])
            stop = int(folder.test_start[user] if split == "valid" else folder.length[user])
            whole = folder.histories([user])
            for event in range(start, stop):
                target, time = int(whole.item[event]), int(whole.timestamp[event])
                offer = [v for v in first_event if v not in GONE and not (mask and v in past)]
                if "file:list.txt" in rule:
                    offer = [v for v in offer if v in LISTED]
                if "available" in rule:
                    left_out += sum(time < first_event[v] for v in offer)
                    offer = [v for v in offer if first_event[v] <= time]
                if event == start:
                    wanted = sorted((value[b][v] for v in offer), reverse=True)[:6]
                if "file:list.txt" in rule and target not in LISTED:
                    continue  # cannot be answered
                if user not in answered:
                    answered.append(user)
                    lists.append(wanted)
                rivals = [value[b][v] for v in offer if v != target]
                mine = value[b][target]
                expected.append([user, target, sum(r > mine for r in rivals), rivals.count(mine)])
        assert actual.to_array().tolist() == expected, scorer.name
        assert actual.lists[:, 0].tolist() == answered
        for n, best in enumerate(lists):
            b = users.tolist().index(answered[n])
            shown = [v for v in actual.lists[n, 1:].tolist() if v]
            assert [value[b][v] for v in shown] == pytest.approx(best, rel=1e-5), scorer.name
    assert (left_out > 80) == ("available" in rule)


def test_results_do_not_depend_on_blocks_and_workers(folder: DataFolder) -> None:
    def ranks(scorer: Scorer, block: int = 5, rank: int = 0, world: int = 1) -> Ranks:
        return rank_split(
            scorer,
            folder,
            "test",
            RankingProtocol(users_per_block=block, max_length=20, mask_seen=True, candidates="available"),
            list_k=4,
            rank=rank,
            world=world,
        )

    for scorer in scorers(folder):
        whole = ranks(scorer)
        assert np.array_equal(ranks(scorer, block=1).to_array(), whole.to_array())
        joined = Ranks.concat([ranks(scorer, rank=r, world=3) for r in range(3)])
        assert np.array_equal(joined.to_array(), whole.to_array())
        assert np.array_equal(joined.lists, whole.lists)


def test_rows_state_the_candidates(folder: DataFolder) -> None:
    knn = make_baseline(BASELINES["text_knn"](name="text_knn"), folder)
    rows, ranks = evaluate_scorers([knn], folder, RankingProtocol(candidates="available", ks=[5]))
    row = rows["test"][0]
    assert "the items available at the target's time, out of the full catalogue (28 items" in row["protocol"]
    assert "2 gone ones left out" in RankingProtocol().describe(folder)
    assert (row["candidates"], row["items"]) == ("available", 28)
    actual = ranks["text_knn", "test"]
    sizes = candidate_counts(folder, "test", np.unique(actual.user), "available")
    assert isinstance(sizes, np.ndarray)
    assert (actual.rank <= sizes).all()
    whole, _ = evaluate_scorers([knn], folder, RankingProtocol(ks=[5]))
    assert whole["test"][0]["candidates"] == "all"
    assert whole["test"][0]["mean_rank"] > row["mean_rank"]
    means = np.array(
        [(1 - (actual.rank - 1) / (sizes - 1))[actual.user == u].mean() for u in np.unique(actual.user)]
    )
    assert row["auc"] == pytest.approx(means.mean())


@pytest.mark.parametrize("rule", RULES[2:])
def test_rows_state_the_allow_list(folder: DataFolder, rule: Rule, tmp_path: Path) -> None:
    knn = make_baseline(BASELINES["text_knn"](name="text_knn"), folder)
    rows, ranks = evaluate_scorers([knn], folder, RankingProtocol(candidates=rule, ks=[5, 10]))
    row, actual = rows["test"][0], ranks["text_knn", "test"]
    on_offer = [v for v in LISTED if v not in GONE]
    assert row["items"] == len(on_offer)
    assert f"the {len(on_offer)} items of file:list.txt (other targets left out), out of" in row["protocol"]
    assert row["candidates"] == ("file:list.txt" if rule == "file:list.txt" else "available, file:list.txt")
    assert set(actual.target.tolist()) <= set(LISTED)
    assert row["coverage@10"] == len(np.unique(actual.lists[:, 1:][actual.lists[:, 1:] > 0])) / len(on_offer)
    sizes = candidate_counts(folder, "test", np.unique(actual.user), rule)
    assert isinstance(sizes, np.ndarray)
    assert len(sizes) == len(actual.user)
    assert (actual.rank <= sizes).all()
    blocks = rank_split(
        knn,
        folder,
        "test",
        RankingProtocol(users_per_block=2, max_length=20, mask_seen=False, candidates=rule),
    )
    assert np.array_equal(blocks.to_array(), actual.to_array())
    (tmp_path / "list.txt").write_text("\n".join(map(str, LISTED[1:])))
    other = evaluate_scorers([knn], folder, RankingProtocol(candidates=rule, ks=[5]))[0]["test"][0]
    assert other["candidates_sha256"] != row["candidates_sha256"], "comparisons would mix the two"


def test_an_allow_list_without_targets_is_refused(folder: DataFolder, tmp_path: Path) -> None:
    (tmp_path / "list.txt").write_text("7")  # gone: nobody met it
    knn = make_baseline(BASELINES["text_knn"](name="text_knn"), folder)
    assert evaluate_scorers([knn], folder, RankingProtocol(candidates="file:list.txt")) == ({}, {})
    ranks = rank_split(
        knn,
        folder,
        "test",
        RankingProtocol(users_per_block=9, max_length=20, mask_seen=False, candidates="file:list.txt"),
    )
    with pytest.raises(FindRecError, match=r"no user .* in the test split among the items of file:list\.txt"):
        summarise(ranks, folder, "test", RankingProtocol(ks=[5], candidates="file:list.txt"), model="m")


def test_available_items_at_a_time(folder: DataFolder) -> None:
    for rule, day in product(RULES, (-1, 0, 400, 10**6, NEVER)):
        shown = Candidates.of(folder, rule).at(day, NUM_ITEMS)
        expected = [v for v in range(1, NUM_ITEMS + 1) if v not in GONE]
        if "available" in rule:
            expected = [v for v in expected if folder.available_from[v] <= day]
        if "file:list.txt" in rule:
            expected = [v for v in expected if v in LISTED]
        assert shown.nonzero().squeeze(1).tolist() == expected


def test_removed_items_are_never_listed(folder: DataFolder) -> None:
    users = evaluated_users(folder, "test")[:5]
    for rule in ("all", "available"):
        for scorer in scorers(folder):
            block = UserBlock.read(folder, "test", users, 20)
            query = Query.of(block, Candidates.of(folder, rule), mask_seen=False)
            ids, _ = scorer.rank(query).top(30)
            assert not np.isin(ids.numpy(), GONE).any()
            assert (ids > 0).sum(1).max() <= 28
    (sample,) = sample_recommendations(scorers(folder)[0], folder, "test", users[:1], RankingProtocol(), k=30)
    assert len(sample.recommended) == 28


def test_nothing_is_masked_if_all_items_are_available(tmp_path: Path) -> None:
    plain = write_data_folder(tmp_path / "plain", [[1, 2, 3]] * 3)
    assert Candidates.of(plain, "all").since_V is None
    assert candidate_counts(plain, "test", np.arange(3), "all") == 3
