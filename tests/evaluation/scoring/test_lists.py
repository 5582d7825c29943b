"""Scorers of lists only: ranks outside of a list are unknown, and all results state it."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch

from findrec.datasets.folder.data_folder import DataFolder
from findrec.errors import FindRecError
from findrec.evaluation.compare.compare import compare_runs
from findrec.evaluation.display.wording import draw_users, sample_recommendations
from findrec.evaluation.protocol import RankingProtocol
from findrec.evaluation.ranking.evaluate import evaluate_scorers, write_results
from findrec.evaluation.report.page import write_report
from findrec.evaluation.scoring.base import Query, Scorer, Top
from findrec.evaluation.scoring.baselines import Cooccurrence, Popularity
from findrec.evaluation.scoring.lists import ListScorer

LIMIT = 12


class FirstOf(ListScorer):
    """The first items of another scorer, with what a careless generator adds: repeats, gaps, seen items."""

    list_limit = LIMIT

    def __init__(self, base: Scorer) -> None:
        self.base, self.name = base, f"lists of {base.name}"

    def generate(self, query: Query) -> Top:
        ids, _ = self.base.rank(query).top(LIMIT)
        seen = query.block.padded_items()[:, :2] if query.seen_BM is not None else ids[:, :0]
        ids = torch.cat([ids[:, :3], torch.zeros_like(ids[:, :1]), ids[:, :2], seen, ids[:, 3:]], dim=1)
        return ids, torch.zeros(ids.shape)


@pytest.mark.parametrize("mask", [False, True])
def test_metrics_within_the_lists_equal_those_of_all_ranks(folder: DataFolder, mask: bool) -> None:
    base = Cooccurrence(folder)
    protocol = RankingProtocol(ks=(5, 10, 20), mask_seen=mask, sampled=8)
    rows, ranks = evaluate_scorers([base, FirstOf(base)], folder, protocol)
    whole, listed = rows["test"]
    known = ranks[listed["model"], "test"].rank
    true = ranks["cooccurrence", "test"]
    sure = true.equal == 0  # a list has no ties
    if mask:  # a target that its user has seen is in no list
        seen = [t in set(h) for t, h in zip(true.target, _histories(folder), strict=True)]
        sure &= ~np.array(seen)
    assert sure.sum() > 5
    assert np.array_equal(known[sure], np.where(true.rank > LIMIT, np.inf, true.rank)[sure])
    assert np.isinf(known).any()
    assert listed["ranks"] == f"lists of {LIMIT} only"
    assert "ranks" not in whole
    hit = known <= 10
    assert listed["recall@10"] == pytest.approx(hit.mean())
    assert listed["mrr@10"] == pytest.approx(np.where(hit, 1 / known, 0).mean())
    for name in ("ndcg@20", "recall@20_se", "mrr", "mrr_se", "mean_rank", "auc"):
        assert listed[name] is None
    assert "coverage@10" in listed
    assert "coverage@20" not in listed
    assert [row["model"] for row in rows["sampled"]] == ["cooccurrence"]


def _histories(folder: DataFolder) -> list[list[int]]:
    return [folder.histories([u]).item[:-1].tolist() for u in range(folder.num_users)]


@pytest.fixture
def run(folder: DataFolder, tmp_path: Path) -> Path:
    run = tmp_path / "run"
    run.mkdir()
    (run / "config.yaml").write_text("name: run\n")
    scorers = [Popularity(folder), FirstOf(Cooccurrence(folder))]
    write_results(run, *evaluate_scorers(scorers, folder, RankingProtocol(ks=(5, 10, 20))), folder)
    return run


def test_only_known_metrics_can_be_compared(run: Path) -> None:
    table = pq.read_table(run / "ranks.parquet")
    assert -1 in table["greater"].to_pylist()
    compared = compare_runs([run], ["ndcg@10", "recall@12"], resamples=200)
    rows = json.loads((run / "metrics.json").read_text())["test"]
    values = {one.model: one.value for one in compared.comparison.estimates if one.metric == "ndcg@10"}
    assert values == pytest.approx({row["model"]: row["ndcg@10"] for row in rows})
    for metric in ("mrr", "auc", "mean_rank", "ndcg@20"):
        with pytest.raises(FindRecError, match=f"within lists of {LIMIT} only, so its {metric} is unknown"):
            compare_runs([run], [metric], resamples=200)


def test_an_unknown_rank_of_a_full_ranking_is_refused(run: Path) -> None:
    rows = json.loads((run / "metrics.json").read_text())
    del rows["test"][1]["ranks"]
    (run / "metrics.json").write_text(json.dumps(rows))
    with pytest.raises(FindRecError, match="do not follow from its counts"):
        compare_runs([run], ["ndcg@10"], resamples=200)


def test_the_report_names_models_with_lists_only(run: Path, folder: DataFolder) -> None:
    page = write_report(run, folder=folder).read_text()
    assert f"lists of cooccurrence: ranks of lists of {LIMIT} only" in page


def test_lists_end_at_their_limit(folder: DataFolder) -> None:
    scorer = FirstOf(Popularity(folder))
    samples = sample_recommendations(
        scorer, folder, "test", draw_users(folder, "test", 3), RankingProtocol(), k=30
    )
    assert [len(sample.recommended) for sample in samples] == [LIMIT] * 3
    assert all(len({one.item for one in sample.recommended}) == LIMIT for sample in samples)
