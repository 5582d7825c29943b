"""The numbers of the tables, against the saved ranks."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest

from findrec.config import RunConfig
from findrec.datasets.folder.data_folder import DataFolder
from findrec.errors import FindRecError
from findrec.evaluation.leaderboard import measure
from findrec.evaluation.leaderboard.checks import Checked
from findrec.evaluation.leaderboard.config import Leaderboard
from findrec.evaluation.leaderboard.table import DataTable, Line, make_tables
from findrec.evaluation.metrics.metrics import case_metrics
from findrec.evaluation.metrics.significance import compare_models
from findrec.evaluation.ranking.evaluate import Ranked
from findrec.evaluation.suites.suites import Suite, read_suites
from findrec.training.runs import run_folder

Finished = tuple[Leaderboard, Checked]


def line_of(table: DataTable, label: str) -> Line:
    return next(line for line in table.lines if line.label == label)


def ranks_of(run: Path, model: str) -> dict[str, np.ndarray]:
    table = pq.read_table(run / "ranks.parquet").to_pandas()
    table = table[(table.model == model) & (table.split == "test")]
    return {name: table[name].to_numpy() for name in ("user", "target", "rank")}


def cells(finished: Finished) -> dict[str, list[tuple[Path, str]]]:
    """The run folders and models of each line."""
    leaderboard, _ = finished
    runs = {
        row: [(run_folder(run.config), "sasrec") for run in leaderboard.of("films", row)]
        for row in leaderboard.rows
    }
    baselines = run_folder(leaderboard.baselines["films"])
    return runs | {name: [(baselines, name)] for name in ("popularity", "text_knn")}


def test_lines_are_means_over_seeds_with_paired_differences(
    table: DataTable, finished: Finished, folder: DataFolder
) -> None:
    assert [line.label for line in table.lines] == ["narrow", "wide|r", "popularity", "text_knn"]
    assert [line.trained for line in table.lines] == [True, True, False, False]
    ranks = {label: [ranks_of(*cell) for cell in of] for label, of in cells(finished).items()}
    values = {
        metric: {
            label: [case_metrics(one["rank"], [5, 10], folder.num_items)[metric] for one in of]
            for label, of in ranks.items()
        }
        for metric in ("ndcg@10", "recall@5")
    }
    means = {m: {label: np.mean(of, axis=0) for label, of in by.items()} for m, by in values.items()}
    user = ranks["narrow"][0]["user"]
    want = compare_models(means, user, resamples=300, reference="narrow")
    assert table.comparisons == len(want.differences) == 6
    for one in want.differences:
        change = line_of(table, one.first).metrics[one.metric].change
        assert (change.value, change.low, change.high, change.p) == (one.value, one.low, one.high, one.p_holm)
        assert change.real == want.is_significant(one)
    for line in table.lines:
        for metric, value in line.metrics.items():
            seeds = [float(np.mean(one)) for one in values[metric][line.label]]  # one case per user
            assert value.seeds == pytest.approx(seeds)
            assert value.mean == pytest.approx(np.mean(seeds))
            assert value.spread == (pytest.approx(np.std(seeds, ddof=1)) if line.trained else None)
    assert line_of(table, "narrow").metrics["ndcg@10"].change is None


def test_further_columns(table: DataTable, finished: Finished, folder: DataFolder) -> None:
    leaderboard, checked = finished
    assert (table.users, table.cases) == (30, 30)
    assert table.events_sha256 == folder.manifest.events_sha256
    for label, of in cells(finished).items():
        line = line_of(table, label)
        valid, cold = [], []
        for run, model in of:
            rows = json.loads((run / "metrics.json").read_text())["valid"]
            valid.append(next(row["ndcg@10"] for row in rows if row["model"] == model))
            ranks = ranks_of(run, model)
            inside = folder.train_count[ranks["target"]] == 0
            cold.append(float((ranks["rank"][inside] <= 50).mean()))
        assert line.valid.seeds == pytest.approx(valid)
        assert table.cold_cases == inside.sum() == 12
        assert line.cold.seeds == pytest.approx(cold)
        assert line.weights == checked.weights.get(("films", label))
        assert len(line.costs) == (2 if line.trained else 0)
    assert any(0 < line.cold.mean < 1 for line in table.lines)
    assert leaderboard.config.reference == "narrow"


def test_suites_are_those_of_the_runs(table: DataTable, finished: Finished) -> None:
    assert table.suite_metric == "ndcg@10"
    for label, of in cells(finished).items():
        line = line_of(table, label)
        kinds = {"length", "noise"} if label == "text_knn" else {"length"}  # the others read no features
        assert line.suites.keys() == kinds
        assert line.plain.seeds == pytest.approx(line.metrics["ndcg@10"].seeds)
        for kind in kinds:
            (level,) = line.suites[kind]
            found = []
            for run, model in of:
                suite = next(one for one in read_suites(run) if one.kind == kind)
                curve = next(one for one in suite.curves if one.model == model)
                found += [p.value for p in curve.of("ndcg@10") if p.level == level]
            assert line.suites[kind][level].seeds == tuple(found)
            assert level == {"length": 3, "noise": 50}[kind]


def test_saved_baselines_and_suites_are_reused(
    table: DataTable, finished: Finished, monkeypatch: pytest.MonkeyPatch
) -> None:
    made: list[str] = []
    rank, suite = measure.rank_scorers, measure.run_suite

    def noted_rank(*args: Any, **options: Any) -> Ranked:
        made.append("ranked")
        return rank(*args, **options)

    def noted_suite(run: Path, kind: str, **options: Any) -> Suite:
        made.append(kind)
        return suite(run, kind, **options)

    monkeypatch.setattr(measure, "rank_scorers", noted_rank)
    monkeypatch.setattr(measure, "run_suite", noted_suite)
    assert make_tables(*finished, resamples=300) == [table]
    assert made == []
    config = finished[0].runs[0].config
    list(measure.suites_of(config, finished[1].folders["films"], {"length": [3, 5]}))
    assert made == ["length"]
    list(measure.suites_of(config, finished[1].folders["films"], {"length": [3, 5]}))
    assert made == ["length"]
    shared: RunConfig = finished[0].baselines["films"]
    (run_folder(shared) / "ranks.parquet").unlink()
    assert make_tables(*finished, resamples=300) == [table]
    assert made == ["length", "ranked", "length", "noise", "length"]


def test_results_of_other_cases_are_refused(finished: Finished) -> None:
    leaderboard, checked = finished
    run = run_folder(leaderboard.runs[0].config)
    before = (run / "ranks.parquet").read_bytes()
    ranks = pq.read_table(run / "ranks.parquet")
    other = {**ranks.schema.metadata, b"findrec.events_sha256": b"0"}
    pq.write_table(ranks.replace_schema_metadata(other), run / "ranks.parquet")
    try:
        with pytest.raises(
            FindRecError, match=r"narrow, 2 .*cannot be compared with narrow, 1.*events_sha256"
        ):
            make_tables(leaderboard, checked)
    finally:
        (run / "ranks.parquet").write_bytes(before)


def test_a_table_of_the_reference_alone(finished: Finished, table: DataTable) -> None:
    leaderboard, checked = finished
    shared = leaderboard.baselines["films"]
    none = shared.model_copy(update={"evaluation": shared.evaluation.model_copy(update={"baselines": []})})
    runs = tuple(leaderboard.of("films", "narrow"))
    (alone,) = make_tables(replace(leaderboard, runs=runs, baselines={"films": none}), checked)
    assert (alone.comparisons, len(alone.lines)) == (0, 1)
    assert alone.lines[0] == line_of(table, "narrow")
