"""Metrics agree with hand-computed numbers and general properties."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import pytest

from findrec.datasets.folder.data_folder import DataFolder
from findrec.datasets.folder.in_memory import write_data_folder
from findrec.datasets.folder.splits import Split
from findrec.evaluation.metrics.metrics import Ranks, case_metrics, strata, summarise
from findrec.evaluation.protocol import RankingProtocol, seen_filter


def ranks_of(user: list[int], rank: list[float], target: list[int] | None = None) -> Ranks:
    doubled = [round(2 * (r - 1)) for r in rank]
    columns = (user, target or [1] * len(user), [d // 2 for d in doubled], [d % 2 for d in doubled])
    return Ranks(*(np.array(c, dtype=np.int64) for c in columns))  # type: ignore[arg-type]


def test_expected_rank_of_ties() -> None:
    ranks = Ranks(*(np.array([v], dtype=np.int64) for v in (0, 1, 4, 3)))  # type: ignore[arg-type]
    assert ranks.rank.tolist() == [6.5]  # ranks 5 to 8 are equally likely


def test_one_row_by_hand(folder: DataFolder) -> None:
    row = summarise(ranks_of([0, 1, 2], [1, 3, 11]), folder, "test", RankingProtocol(ks=[5, 10]), model="m")
    assert row["model"] == "m"
    assert (
        row["protocol"] == "leave-one-out, full catalogue (40 items), seen items kept, ties at expected rank"
    )
    assert (row["users"], row["cases"], row["items"], row["split"]) == (3, 3, 40, "test")
    assert row["recall@5"] == pytest.approx(2 / 3)
    assert row["recall@10"] == pytest.approx(2 / 3)
    assert row["ndcg@10"] == pytest.approx((1 + 1 / math.log2(4)) / 3)
    assert row["mrr@10"] == pytest.approx((1 + 1 / 3) / 3)
    assert row["mrr"] == pytest.approx((1 + 1 / 3 + 1 / 11) / 3)
    assert row["mean_rank"] == 5
    assert row["auc"] == pytest.approx(1 - 4 / 39)
    values = np.array([1, 0.5, 0])
    assert row["ndcg@10_se"] == pytest.approx(values.std(ddof=1) / math.sqrt(3))


def test_users_have_equal_weight(folder: DataFolder) -> None:
    row = summarise(
        ranks_of([3, 3, 3, 7], [1, 20, 20, 20]), folder, "test", RankingProtocol(ks=[10]), model="m"
    )
    assert row["recall@10"] == pytest.approx((1 / 3 + 0) / 2)
    assert (row["users"], row["cases"]) == (2, 4)
    alone = summarise(ranks_of([3], [1]), folder, "test", RankingProtocol(ks=[10], mask_seen=True), model="m")
    assert alone["ndcg@10_se"] is None
    assert "seen items removed" in alone["protocol"]


def test_default_seen_filter_depends_on_the_repeat_rate(tmp_path: Path) -> None:
    often = write_data_folder(tmp_path / "often", [[1, 2, 1, 2, 1, 3]] * 5)
    never = write_data_folder(tmp_path / "never", [[1, 2, 3, 4, 5, 6]] * 5)
    assert [seen_filter(None, folder) for folder in (often, never)] == [False, True]
    for configured in (True, False):
        assert seen_filter(configured, often) is seen_filter(configured, never) is configured


def test_mrr_below_ndcg_below_recall() -> None:
    rank = 1 + np.arange(0, 60) / 2
    values = case_metrics(rank, [1, 5, 20], 100)
    for k in (1, 5, 20):
        assert (values[f"mrr@{k}"] <= values[f"ndcg@{k}"]).all()
        assert (values[f"ndcg@{k}"] <= values[f"recall@{k}"]).all()
        assert values[f"recall@{k}"].sum() == (rank <= k).sum()


def test_no_cases_is_an_error(folder: DataFolder) -> None:
    with pytest.raises(ValueError, match="no user"):
        summarise(Ranks.concat([]), folder, "valid", RankingProtocol(ks=[5]), model="m")


def test_concat_orders_by_user_and_keeps_the_order_of_targets() -> None:
    one, two = ranks_of([5, 5], [1, 2], [9, 4]), ranks_of([2, 8], [3, 4], [7, 7])
    listed = Ranks(two.user, two.target, two.greater, two.equal, np.array([[8, 1, 2], [2, 3, 4]]))
    joined = Ranks.concat([one, listed])
    assert joined.user.tolist() == [2, 5, 5, 8]
    assert joined.target.tolist() == [7, 9, 4, 7]
    assert joined.lists.tolist() == [[2, 3, 4], [8, 1, 2]]
    assert np.array_equal(Ranks.from_array(joined.to_array()).rank, joined.rank)


def test_coverage_counts_distinct_items(folder: DataFolder) -> None:
    base = ranks_of([0, 1], [1, 1])
    lists = np.array([[0, 3, 4, 5], [1, 3, 9, 0]])
    ranks = Ranks(base.user, base.target, base.greater, base.equal, lists)
    row = summarise(ranks, folder, "test", RankingProtocol(ks=[1, 3, 10]), model="m")
    assert row["coverage@1"] == 1 / 40
    assert row["coverage@3"] == 4 / 40  # 3, 4, 5, 9; 0 is no item
    assert "coverage@10" not in row


def test_strata_split_the_cases(folder: DataFolder) -> None:
    targets = [int(np.argmax(folder.train_count)), 40, 1 + int(np.argmin(folder.train_count[1:] == 0))]
    parts = strata(ranks_of([0, 1, 2], [1, 2, 30], targets), folder, "test", model="m")
    by_name = {row["part"]: row for row in parts}
    assert by_name["target head"]["recall@10"] >= 0.5
    assert by_name["target cold"] == {"model": "m", "split": "test", "part": "target cold", "cases": 1} | {
        "ndcg@10": pytest.approx(1 / math.log2(3)),
        "recall@10": 1.0,
        "ndcg@10_se": None,
        "recall@10_se": None,
    }
    names = list(by_name)
    assert by_name["target warm"]["cases"] + by_name["target cold"]["cases"] == 3
    assert sum(by_name[n]["cases"] for n in ("target head", "target tail") if n in names) == 2
    assert sum(by_name[n]["cases"] for n in names if n.startswith("history")) == 3
    parts = strata(ranks_of([0, 1, 2], [1, 2, 30], [5, 12, 6]), folder, "test", model="m")  # two without text
    texts = {row["part"]: row["cases"] for row in parts if "text" in row["part"]}
    assert texts == {"target with text": 1, "target without text": 2}
    other = strata(ranks_of([0, 0], [1, 2]), folder, "test", model="m")  # not all cases, or others
    assert sum(row["cases"] for row in other if row["part"].startswith("history")) == 2


def test_standard_error_of_a_part_is_over_users(tmp_path: Path) -> None:
    """Cases that repeat each other within a user say no more than one of them."""
    split = Split(kind="per_user_ratio", ratio=(1, 0, 1))
    once = write_data_folder(tmp_path / "once", [[1, 2]] * 4, num_items=50, split=split)
    twice = write_data_folder(tmp_path / "twice", [[1, 1, 2, 2]] * 4, num_items=50, split=split)
    ranks = [1.0, 2.0, 4.0, 20.0]
    short = strata(ranks_of([0, 1, 2, 3], ranks), once, "test", model="m")[0]
    users = np.repeat(np.arange(4), 2).tolist()
    long = strata(ranks_of(users, np.repeat(ranks, 2).tolist()), twice, "test", model="m")[0]
    assert (short["cases"], long["cases"]) == (4, 8)
    assert long["ndcg@10_se"] == pytest.approx(short["ndcg@10_se"])
    values = np.array([1, 1 / math.log2(3), 1 / math.log2(5), 0])
    assert short["ndcg@10_se"] == pytest.approx(values.std(ddof=1) / 2)
