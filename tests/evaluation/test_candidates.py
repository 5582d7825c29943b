"""Candidates that are on offer at the target's time, against counting one case after the other."""

from __future__ import annotations

from itertools import product
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from torch import Tensor

from findrec.config import ModelConfig
from findrec.datasets.batches import Part, evaluated_users
from findrec.datasets.catalogue import Catalogue
from findrec.datasets.folder import ALWAYS, NEVER, DataFolder
from findrec.datasets.memory import write_data_folder
from findrec.datasets.splits import Split
from findrec.errors import FindRecError
from findrec.evaluation.baselines import make_baseline
from findrec.evaluation.candidates import Candidates, Rule, candidate_counts
from findrec.evaluation.evaluate import evaluate_scorers, rank_split
from findrec.evaluation.metrics import Ranks, describe_protocol, summarise
from findrec.evaluation.report import sample_recommendations
from findrec.evaluation.scorers import BlockScorer, ModelScorer, Scorer, UserBlock
from findrec.evaluation.topk import TopItems
from findrec.models.registry import build_model

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
    config = ModelConfig(name="sasrec", dim=8, layers=1, heads=1)
    model = build_model(config, feature_dims={}, repeat=True, max_length=20)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.3 * torch.randn_like(parameter))
    trained = ModelScorer(model, torch.randn(NUM_ITEMS + 1, 8), Catalogue(folder, []), 20, "cpu")
    plain = ("popularity", "cooccurrence", "own_frequent", "text_knn")
    return [trained, *(make_baseline(name, folder) for name in plain)]


def values(scorer: Scorer, block: UserBlock) -> list[list[float]]:
    """What each user's items 1..V are compared by; 0 for padding."""
    if isinstance(scorer, BlockScorer):
        return [[0, *row] for row in scorer.keys(block, 1, NUM_ITEMS + 1).tolist()]
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
def test_ranks_and_lists_are_those_of_brute_force(
    folder: DataFolder, split: Part, mask: bool, rule: Rule
) -> None:
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
        found = rank_split(
            *(scorer, folder, split),
            users_per_block=7,
            max_length=20,
            mask_seen=mask,
            list_k=6,
            candidates=rule,
        )
        expected, lists, answered = [], [], []
        for b, user in enumerate(users.tolist()):
            past = set(block.item[block.offset[b] : block.offset[b + 1]].tolist())
            start = int(folder.valid_start[user] if split == "valid" else folder.test_start[user])
            stop = int(folder.test_start[user] if split == "valid" else folder.length[user])
            whole = folder.histories([user])
            for place in range(start, stop):
                target, time = int(whole.item[place]), int(whole.timestamp[place])
                offer = [v for v in first_event if v not in GONE and not (mask and v in past)]
                if "file:list.txt" in rule:
                    offer = [v for v in offer if v in LISTED]
                if "available" in rule:
                    left_out += sum(time < first_event[v] for v in offer)
                    offer = [v for v in offer if first_event[v] <= time]
                if place == start:
                    wanted = sorted((value[b][v] for v in offer), reverse=True)[:6]
                if "file:list.txt" in rule and target not in LISTED:
                    continue  # cannot be answered
                if user not in answered:
                    answered.append(user)
                    lists.append(wanted)
                rivals = [value[b][v] for v in offer if v != target]
                mine = value[b][target]
                expected.append([user, target, sum(r > mine for r in rivals), rivals.count(mine)])
        assert found.to_array().tolist() == expected, scorer.name
        assert found.lists[:, 0].tolist() == answered
        for n, best in enumerate(lists):
            b = users.tolist().index(answered[n])
            shown = [v for v in found.lists[n, 1:].tolist() if v]
            assert [value[b][v] for v in shown] == pytest.approx(best, rel=1e-5), scorer.name
    assert (left_out > 80) == ("available" in rule)


def test_blocks_and_workers_change_no_digit(folder: DataFolder) -> None:
    def ranks(scorer: Scorer, block: int = 5, rank: int = 0, world: int = 1) -> Ranks:
        return rank_split(
            *(scorer, folder, "test"),
            users_per_block=block,
            max_length=20,
            mask_seen=True,
            candidates="available",
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


def test_rows_say_what_competed(folder: DataFolder) -> None:
    knn = make_baseline("text_knn", folder)
    rows, ranks = evaluate_scorers([knn], folder, candidates="available", ks=[5])
    row = rows["test"][0]
    assert "the items available at the target's time, out of the full catalogue (28 items" in row["protocol"]
    assert "2 gone ones left out" in describe_protocol(folder, False)
    assert (row["candidates"], row["items"]) == ("available", 28)
    found = ranks["text_knn", "test"]
    sizes = candidate_counts(folder, "test", np.unique(found.user), "available")
    assert isinstance(sizes, np.ndarray)
    assert (found.rank <= sizes).all()
    whole, _ = evaluate_scorers([knn], folder, ks=[5])
    assert whole["test"][0]["candidates"] == "all"
    assert whole["test"][0]["mean_rank"] > row["mean_rank"]
    means = np.array(
        [(1 - (found.rank - 1) / (sizes - 1))[found.user == u].mean() for u in np.unique(found.user)]
    )
    assert row["auc"] == pytest.approx(means.mean())


@pytest.mark.parametrize("rule", RULES[2:])
def test_rows_of_allow_lists_say_so(folder: DataFolder, rule: Rule, tmp_path: Path) -> None:
    knn = make_baseline("text_knn", folder)
    rows, ranks = evaluate_scorers([knn], folder, candidates=rule, ks=[5, 10])
    row, found = rows["test"][0], ranks["text_knn", "test"]
    on_offer = [v for v in LISTED if v not in GONE]
    assert row["items"] == len(on_offer)
    assert f"the {len(on_offer)} items of file:list.txt (other targets left out), out of" in row["protocol"]
    assert row["candidates"] == ("file:list.txt" if rule == "file:list.txt" else "available, file:list.txt")
    assert set(found.target.tolist()) <= set(LISTED)
    assert row["coverage@10"] == len(np.unique(found.lists[:, 1:][found.lists[:, 1:] > 0])) / len(on_offer)
    sizes = candidate_counts(folder, "test", np.unique(found.user), rule)
    assert isinstance(sizes, np.ndarray)
    assert len(sizes) == len(found.user)
    assert (found.rank <= sizes).all()
    blocks = rank_split(
        *(knn, folder, "test"), users_per_block=2, max_length=20, mask_seen=False, candidates=rule
    )
    assert np.array_equal(blocks.to_array(), found.to_array())
    (tmp_path / "list.txt").write_text("\n".join(map(str, LISTED[1:])))
    other = evaluate_scorers([knn], folder, candidates=rule, ks=[5])[0]["test"][0]
    assert other["candidates_sha256"] != row["candidates_sha256"], "comparisons would mix the two"


def test_a_list_without_targets_leaves_nothing_to_measure(folder: DataFolder, tmp_path: Path) -> None:
    (tmp_path / "list.txt").write_text("7")  # gone: nobody met it
    knn = make_baseline("text_knn", folder)
    assert evaluate_scorers([knn], folder, candidates="file:list.txt") == ({}, {})
    ranks = rank_split(
        *(knn, folder, "test"), users_per_block=9, max_length=20, mask_seen=False, candidates="file:list.txt"
    )
    with pytest.raises(FindRecError, match=r"no user .* in the test split among the items of file:list\.txt"):
        summarise(ranks, folder, "test", ks=[5], model="m", candidates="file:list.txt")


def test_what_may_be_shown_at_a_time(folder: DataFolder) -> None:
    for rule, day in product(RULES, (-1, 0, 400, 10**6, NEVER)):
        shown = Candidates.of(folder, rule).at(day, NUM_ITEMS)
        expected = [v for v in range(1, NUM_ITEMS + 1) if v not in GONE]
        if "available" in rule:
            expected = [v for v in expected if folder.available_from[v] <= day]
        if "file:list.txt" in rule:
            expected = [v for v in expected if v in LISTED]
        assert shown.nonzero().squeeze(1).tolist() == expected


def test_gone_items_are_never_shown(folder: DataFolder) -> None:
    users = evaluated_users(folder, "test")[:5]
    for rule in ("all", "available"):
        for scorer in scorers(folder):
            block = UserBlock.read(folder, "test", users, 20)
            ids, _ = TopItems(scorer, Candidates.of(folder, rule)).of(block, 30, mask_seen=False)  # type: ignore[arg-type]
            assert not np.isin(ids.numpy(), GONE).any()
            assert (ids > 0).sum(1).max() <= 28
    (sample,) = sample_recommendations(scorers(folder)[0], folder, "test", users[:1], 30)
    assert len(sample.recommended) == 28


def test_without_times_to_mind_nothing_is_masked(tmp_path: Path) -> None:
    plain = write_data_folder(tmp_path / "plain", [[1, 2, 3]] * 3)
    assert Candidates.of(plain, "all").since_V is None
    assert candidate_counts(plain, "test", np.arange(3), "all") == 3
