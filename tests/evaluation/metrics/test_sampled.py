"""Sampled metrics agree with all possible draws and with sampling; their rows are separate."""

from __future__ import annotations

import json
from dataclasses import replace
from itertools import combinations
from pathlib import Path

import numpy as np
import pytest

from findrec.datasets.folder.data_folder import DataFolder
from findrec.evaluation.compare.compare import compare_runs
from findrec.evaluation.metrics.metrics import case_metrics
from findrec.evaluation.metrics.sampled import pool_sizes, sampled_metrics
from findrec.evaluation.protocol import RankingProtocol
from findrec.evaluation.ranking.evaluate import evaluate_scorers, write_results
from findrec.evaluation.scoring.baselines import OwnFrequent, Popularity
from findrec.evaluation.scoring.users import UserBlock

KS = [1, 2, 5]


@pytest.mark.parametrize("pool", [1, 2, 7])
@pytest.mark.parametrize("count", [1, 3, 7, 20])
def test_agrees_with_the_mean_over_all_draws(pool: int, count: int) -> None:
    pairs = [(g, e) for g in range(pool + 1) for e in range(pool + 1 - g)]
    greater, equal = np.array(pairs).T
    actual = sampled_metrics(greater, equal, np.full(len(pairs), pool), count, KS)
    assert set(actual) == {f"{name}@{k}" for name in ("ndcg", "recall", "mrr") for k in KS} | {"mrr"}
    for c, (g, e) in enumerate(pairs):
        others = [2] * g + [1] * e + [0] * (pool - g - e)  # above, tied, below
        draws = list(combinations(others, min(count, pool)))
        rank = np.array([1 + drawn.count(2) + drawn.count(1) / 2 for drawn in draws])
        expected = case_metrics(rank, KS, 2)
        for name, values in actual.items():
            assert values[c] == pytest.approx(expected[name].mean(), abs=1e-12), (name, g, e)


def test_large_pools_agree_with_sampling() -> None:
    rng, draws = np.random.default_rng(0), 40_000
    cases = [(0, 0, 100_000), (300, 0, 100_000), (5_000, 2_000, 100_000), (99_000, 900, 100_000)]
    greater, equal, pool = np.array(cases).T
    actual = sampled_metrics(greater, equal, pool, 100, [10])
    for c, (g, e, size) in enumerate(cases):
        drawn = rng.multivariate_hypergeometric([g, e, size - g - e], 100, size=draws)
        values = case_metrics(1 + drawn[:, 0] + drawn[:, 1] / 2, [10], 2)
        for name in actual:
            error = values[name].std() / np.sqrt(draws)
            assert abs(actual[name][c] - values[name].mean()) <= 5 * error + 1e-9, (name, cases[c])


def test_impossible_counts_are_refused() -> None:
    one = np.ones(1, dtype=np.int64)
    for greater, equal, pool, count in ((one, one, one, 5), (one, 0 * one, one, 0), (-one, one, one, 5)):
        with pytest.raises(ValueError, match="within the pool"):
            sampled_metrics(greater, equal, pool, count, KS)


@pytest.mark.parametrize("mask", [False, True])
def test_pool_sizes_count_the_candidates(folder: DataFolder, histories: list[list[int]], mask: bool) -> None:
    pool = pool_sizes(folder, "test", RankingProtocol(users_per_block=7, mask_seen=mask))
    for user, history in enumerate(histories):
        removed = set(history[:-1]) - {history[-1]} if mask else set()
        assert pool[user] == folder.num_items - 1 - len(removed)
    assert UserBlock.read(folder, "test", np.arange(3), 1).batch.item.shape == (3, 1)


@pytest.mark.parametrize("mask", [False, True])
def test_sampled_rows_are_separate(folder: DataFolder, tmp_path: Path, mask: bool) -> None:
    protocol = RankingProtocol(ks=[5, 10], mask_seen=mask)
    scorers = [Popularity(folder), OwnFrequent(folder)]
    rows, ranks = evaluate_scorers(scorers, folder, replace(protocol, sampled=8))
    write_results(tmp_path, rows, ranks, folder)
    saved = json.loads((tmp_path / "metrics.json").read_text())
    assert [row["model"] for row in saved["sampled"]] == ["popularity", "own_frequent"]
    for row, full in zip(saved["sampled"], saved["test"], strict=True):
        assert row["protocol"] == "sampled 8 (not comparable)"
        assert row["sampled_from"] == full["protocol"]
        assert row["users"] == full["users"]
        assert row["ndcg@5"] > full["ndcg@5"], "fewer rivals, rosier figures"
    plain, _ = evaluate_scorers(scorers, folder, protocol)
    assert "sampled" not in plain
    assert plain["test"] == rows["test"]
    whole, _ = evaluate_scorers(scorers, folder, replace(protocol, sampled=10_000))
    for row, full in zip(whole["sampled"], whole["test"], strict=True):
        for name in ("ndcg@5", "recall@10", "mrr", "mrr_se"):
            assert row[name] == pytest.approx(full[name], abs=1e-12), "among all it is the full ranking"
    assert compare_runs([tmp_path], resamples=200).cases == saved["test"][0]["cases"]
