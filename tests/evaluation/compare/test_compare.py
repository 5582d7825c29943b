"""`findrec compare`: significance from saved ranks, and refusal of incomparable results."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
import pytest
from rich.console import Console

from findrec.cli.app import main
from findrec.datasets.folder.data_folder import DataFolder
from findrec.datasets.folder.in_memory import write_data_folder
from findrec.errors import FindRecError
from findrec.evaluation.compare.compare import RunComparison, compare_runs
from findrec.evaluation.compare.display import comparison_table, describe
from findrec.evaluation.metrics.metrics import Ranks, case_metrics, summarise
from findrec.evaluation.metrics.significance import compare_models
from findrec.evaluation.protocol import RankingProtocol
from findrec.evaluation.ranking.evaluate import evaluate_scorers, write_results
from findrec.evaluation.scoring.baselines import Cooccurrence, OwnFrequent, Popularity

Runs = Callable[..., Path]


@pytest.fixture
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("FINDREC_HOME", str(tmp_path))
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))
    return tmp_path


@pytest.fixture
def evaluated(folder: DataFolder, home: Path) -> Runs:
    """Make a run folder as an evaluation leaves it, with some baselines in the role of its models."""

    def make(name: str, *scorers: type, data: DataFolder = folder, **options: Any) -> Path:
        run = home / "runs" / name
        run.mkdir(parents=True)
        (run / "config.yaml").write_text(f"name: {name}\n")
        chosen = scorers or (OwnFrequent, Popularity, Cooccurrence)
        write_results(
            run, *evaluate_scorers([kind(data) for kind in chosen], data, RankingProtocol(**options)), data
        )
        return run

    return make


def save(run: Path, folder: DataFolder, models: Mapping[str, tuple[list[int], list[int]]]) -> Path:
    """A run with given users and ranks; the targets are items 1, 2, ..."""
    run.mkdir(parents=True)
    ranks = {}
    for model, (user, rank) in models.items():
        columns = (user, range(1, len(user) + 1), [r - 1 for r in rank], [0] * len(user))
        arrays: list[Any] = [np.array(column, dtype=np.int64) for column in columns]
        ranks[model, "test"] = Ranks(*arrays)
    rows = [
        summarise(r, folder, "test", RankingProtocol(ks=(5, 10)), model=model)
        for (model, _), r in ranks.items()
    ]
    write_results(run, {"test": rows}, ranks, folder)
    return run


def shown(compared: RunComparison, metric: str) -> list[list[str]]:
    """The cells of the printed table, a list a line."""
    console = Console(width=200)
    with console.capture() as capture:
        console.print(comparison_table(compared, metric))
    lines = [line for line in capture.get().splitlines() if line.startswith("│")]
    return [[cell.strip() for cell in line.strip("│").split("│")] for line in lines]


def test_all_models_of_one_run_are_compared(evaluated: Runs, folder: DataFolder) -> None:
    run = evaluated("demo")
    metrics = ["ndcg@10", "recall@5", "mrr@20", "mrr", "mean_rank", "auc", "ndcg@7"]
    for split in ("test", "valid"):
        compared = compare_runs([run], metrics, split=split, resamples=200, seed=3)
        rows = {row["model"]: row for row in json.loads((run / "metrics.json").read_text())[split]}
        assert list(compared.origin) == ["own_frequent", "popularity", "cooccurrence"]
        assert compared.protocol == rows["popularity"]["protocol"]
        assert (compared.comparison.users, compared.cases) == (30, 30)
        for estimate in compared.comparison.estimates:
            if estimate.metric != "ndcg@7":  # saved for other cuts only
                assert estimate.value == pytest.approx(rows[estimate.model][estimate.metric], abs=1e-12)
            assert estimate.low <= estimate.value <= estimate.high
        table = pq.read_table(run / "ranks.parquet").to_pandas()
        values = {
            metric: {
                model: case_metrics(
                    table.loc[(table.model == model) & (table.split == split), "rank"].to_numpy(),
                    [5, 7, 10, 20],
                    folder.num_items,
                )[metric]
                for model in rows
            }
            for metric in metrics
        }
        assert compared.comparison == compare_models(values, resamples=200, seed=3)


def test_users_with_several_targets_count_once(folder: DataFolder, tmp_path: Path) -> None:
    user = [0, 0, 0, 4, 9]
    run = save(tmp_path / "a", folder, {"one": (user, [1, 1, 1, 9, 9]), "two": (user, [9, 9, 9, 1, 9])})
    compared = compare_runs([run], ["recall@5"], resamples=100)
    assert [e.value for e in compared.comparison.estimates] == pytest.approx([1 / 3, 1 / 3])
    assert (compared.comparison.users, compared.cases) == (3, 5)


def test_several_runs_are_compared(evaluated: Runs, folder: DataFolder, tmp_path: Path) -> None:
    runs = [evaluated("one"), evaluated("two", Cooccurrence, Popularity), evaluated("three")]
    compared = compare_runs(runs, resamples=200)
    assert list(compared.origin) == ["one: own_frequent", "two: cooccurrence", "three: own_frequent"]
    same = next(d for d in compared.comparison.differences if d.second == "three: own_frequent")
    assert (same.first, same.value, same.p_holm) == ("one: own_frequent", 0.0, 1.0)
    chosen = compare_runs(runs, models=["popularity"], resamples=200)
    assert list(chosen.origin) == ["one: popularity", "two: popularity", "three: popularity"]
    assert {d.p_holm for d in chosen.comparison.differences} == {1.0}
    assert len(compare_runs(runs, models=["all"], resamples=200).origin) == 8
    assert list(compare_runs(runs[:1], models=["popularity", "cooccurrence"], resamples=200).origin) == [
        "popularity",
        "cooccurrence",
    ]
    mixed = compare_runs(runs[:2], models=["own_frequent", "cooccurrence"], resamples=200)
    assert list(mixed.origin) == ["one: own_frequent", "one: cooccurrence", "two: cooccurrence"]
    with pytest.raises(FindRecError, match=r"two has no model 'own_frequent'.*available: cooccurrence"):
        compare_runs(runs[:2], models=["own_frequent"])
    with pytest.raises(FindRecError, match="no run has a model 'popularty'; did you mean 'popularity'"):
        compare_runs(runs[:2], models=["cooccurrence", "popularty"])
    namesake = save(tmp_path / "elsewhere" / "one", folder, {"m": (list(range(30)), [1] * 30)})
    with pytest.raises(FindRecError, match="targets of"):
        compare_runs([runs[0], namesake])


def test_labels_of_runs_with_equal_names(folder: DataFolder, tmp_path: Path) -> None:
    models = {"m": ([0, 1, 2], [1, 5, 9])}
    runs = [save(tmp_path / parent / "demo", folder, models) for parent in ("here", "there")]
    assert list(compare_runs(runs, resamples=100).origin) == [f"{run}: m" for run in runs]


@pytest.mark.parametrize("order", [("bad", "near[x]", "good"), ("good", "near[x]", "bad")])
def test_table_shows_significant_wins(order: tuple[str, ...], folder: DataFolder, tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    users = list(range(30))
    good = rng.integers(1, 4, 30)
    near = good.copy()
    near[0] += 1  # one user more or less proves nothing
    ranks = {"bad": rng.integers(15, 30, 30), "near[x]": near, "good": good}
    run = save(tmp_path / "a", folder, {name: (users, ranks[name].tolist()) for name in order})
    compared = compare_runs([run], ["ndcg@5", "mean_rank"], resamples=2000)
    for metric in ("ndcg@5", "mean_rank"):
        lines = shown(compared, metric)
        assert [line[:2] for line in lines] == [["1", "good"], ["2", "near[x]"], ["3", "bad"]]
        assert [line[-1] for line in lines] == ["3", "3", "-"]
        assert lines[0][4:7] == ["", "", ""]
        sign = "+" if metric == "mean_rank" else "-"
        assert all(line[4].startswith(sign) for line in lines[1:])
        for line in lines[1:]:
            low, high = (float(end) for end in line[5].split(" .. "))
            assert low <= float(line[4]) <= high
        assert lines[1][6] == "1"
        assert 0 < float(lines[2][6]) < 0.05
    explained = "\n".join(describe(compared))
    assert "30 users, 30 cases" in explained
    assert "6 comparisons" in explained
    assert "NOTE" not in explained
    few = describe(compare_runs([run], ["ndcg@5", "mean_rank"], resamples=100))
    assert "--resamples 480" in "\n".join(few)


def test_command_prints_and_writes(evaluated: Runs, home: Path, capsys: pytest.CaptureFixture[str]) -> None:
    evaluated("demo")
    command = ["compare", "demo", "--metric", "mrr", "--metric", "ndcg@10", "--resamples", "300"]
    assert main([*command, "--split", "valid", "--seed", "4", "--json", "out/figures.json"]) == 0
    text = capsys.readouterr().out
    assert "mrr, valid" in text
    assert "300 resamples, seed 4" in text
    assert "Holm's correction for 6 comparisons" in text
    tree = json.loads((home / "out" / "figures.json").read_text())
    direct = compare_runs([home / "runs" / "demo"], ["mrr", "ndcg@10"], split="valid", resamples=300, seed=4)
    assert [row["p_holm"] for row in tree["differences"]] == [d.p_holm for d in direct.comparison.differences]
    assert [row["value"] for row in tree["estimates"]] == [e.value for e in direct.comparison.estimates]
    assert {row["real"] for row in tree["differences"]} <= {True, False}
    assert tree["models"]["popularity"] == {"run": str(home / "runs" / "demo"), "model": "popularity"}
    assert set(tree["data"]) == {"data", "events_sha256"}
    assert (tree["split"], tree["users"], tree["seed"], tree["level"]) == ("valid", 30, 4, 0.95)
    (home / "file").write_text("")
    assert main([*command, "--json", "file/x.json"]) == 2
    assert "cannot write file/x.json" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["demo", "--metric", "ndgc@10"], "did you mean 'ndcg@10'"),
        (["demo", "--metric", "HR@10"], "did you mean 'recall@10'"),
        (["demo", "--metric", "NDCG@10"], "did you mean 'ndcg@10'"),
        (["demo", "--metric", "coverage@10"], "not a mean over users"),
        (["demo", "--metric", "ndcg@0"], "any K >= 1"),
        (["demo", "--split", "tset"], "did you mean 'test'"),
        (["demo", "--split", "strata"], "available: valid, test"),
        (["demo", "--model", "popularty"], "did you mean 'popularity'"),
        (["demo", "--model", "popularity"], "needs two models, there is only popularity of"),
        (["lonely"], "--model all"),
        (["demo", "demo"], "more than once"),
        (["demo", "lonly"], "did you mean 'lonely'"),
        (["demo", "--resamples", "99"], "100"),
    ],
)
def test_errors_are_reported(
    arguments: list[str], message: str, evaluated: Runs, capsys: pytest.CaptureFixture[str]
) -> None:
    evaluated("demo")
    evaluated("lonely", Popularity)
    assert main(["compare", *arguments]) == 2
    assert message in capsys.readouterr().err


def test_runs_measured_differently_are_refused(
    evaluated: Runs, folder: DataFolder, histories: list[list[int]], tmp_path: Path
) -> None:
    first = evaluated("first")
    longer = write_data_folder(tmp_path / "longer", [[1, *past] for past in histories], num_items=40)
    fewer = save(tmp_path / "fewer", folder, {"m": (list(range(29)), [1] * 29)})
    others = {
        r"events_sha256: '\w+', not '\w+'": evaluated("other data", data=longer),
        r"seen items removed.*seen_filter: True, not False": evaluated("masked", mask_seen=True),
        r"users: 29, not 30; cases: 29, not 30": fewer,
    }
    for message, run in others.items():
        with pytest.raises(FindRecError, match=message):
            compare_runs([first, run])
    one = save(tmp_path / "one", folder, {"m": ([0, 1, 2], [1, 1, 1])})
    two = save(tmp_path / "two", folder, {"m": ([0, 1, 7], [1, 1, 1])})
    with pytest.raises(FindRecError, match="users: 1 are missing, the first is user row 2"):
        compare_runs([one, two])
    three = save(tmp_path / "three", folder, {"m": ([0, 0, 1], [1, 1, 1])})
    four = save(tmp_path / "four", folder, {"m": ([0, 1, 1], [1, 1, 1])})
    with pytest.raises(FindRecError, match="different numbers of targets"):
        compare_runs([three, four])
    alone = save(tmp_path / "alone", folder, {"a": ([5, 5], [1, 2]), "b": ([5, 5], [2, 1])})
    with pytest.raises(FindRecError, match="one user"):
        compare_runs([alone])


def cut_short(run: Path) -> None:
    path = run / "ranks.parquet"
    path.write_bytes(path.read_bytes()[:-100])


def alter(column: str, change: Callable[[pa.ChunkedArray], pa.Array]) -> Callable[[Path], None]:
    def apply(run: Path) -> None:
        table = pq.read_table(run / "ranks.parquet")
        index = table.schema.get_field_index(column)
        pq.write_table(table.set_column(index, column, change(table.column(column))), run / "ranks.parquet")

    return apply


def drop(column: str) -> Callable[[Path], None]:
    return lambda run: pq.write_table(
        pq.read_table(run / "ranks.parquet").drop_columns([column]), run / "ranks.parquet"
    )


def rewrite(name: str, text: str) -> Callable[[Path], None]:
    def apply(run: Path) -> None:
        (run / name).write_text(text)

    return apply


def lose_cases(run: Path) -> None:
    pq.write_table(pq.read_table(run / "ranks.parquet").slice(0, 170), run / "ranks.parquet")


def swap_models(run: Path) -> None:
    path = run / "metrics.json"
    names = path.read_text().replace('"popularity"', '"x"').replace('"cooccurrence"', '"popularity"')
    path.write_text(names.replace('"x"', '"cooccurrence"'))


def forget_protocol(run: Path) -> None:
    path = run / "metrics.json"
    path.write_text(path.read_text().replace('"protocol"', '"note"'))


def misstate(run: Path) -> None:
    rows = json.loads((run / "metrics.json").read_text())
    rows["test"][1]["ndcg@10"] += 1e-6
    (run / "metrics.json").write_text(json.dumps(rows))


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (cut_short, "ranks.parquet is damaged"),
        (rewrite("ranks.parquet", ""), "ranks.parquet is damaged"),
        (lambda run: (run / "ranks.parquet").unlink(), "has no ranks.parquet: it was not evaluated"),
        (drop("rank"), "no column 'rank'"),
        (drop("greater"), "no column 'greater'"),
        (alter("user", lambda c: c.cast(pa.string())), "other types"),
        (alter("rank", lambda c: pa.nulls(len(c), c.type)), "empty cells"),
        (alter("rank", lambda c: pa.array(np.full(len(c), np.nan))), "do not follow from its counts"),
        (alter("rank", lambda c: pc.add(c, 1.0)), "do not follow from its counts"),
        (alter("equal", lambda c: pc.add(c, -999)), "do not follow from its counts"),
        (alter("target", lambda c: pc.add(c, 100)), "beyond its 40 items"),
        (alter("user", lambda c: pc.add(c, -1)), "are negative"),
        (lose_cases, "it has 20 cases of cooccurrence, metrics.json has 30"),
        (swap_models, "metrics.json has"),
        (misstate, "metrics.json has"),
        (rewrite("metrics.json", '{"test": ['), "metrics.json is damaged"),
        (rewrite("metrics.json", "[]"), "no rows of models"),
        (rewrite("metrics.json", '{"test": [{"ndcg@10": 1}]}'), "no rows of models"),
        (rewrite("metrics.json", '{"test": []}'), "holds no results"),
        (forget_protocol, "has no protocol for own_frequent"),
        (lambda run: (run / "metrics.json").unlink(), "was not evaluated"),
    ],
)
def test_damaged_results_are_refused(damage: Callable[[Path], None], message: str, evaluated: Runs) -> None:
    run = evaluated("demo")
    compare_runs([run], resamples=100)
    damage(run)
    with pytest.raises(FindRecError, match=message) as caught:
        compare_runs([run], resamples=100)
    assert "findrec evaluate demo" in str(caught.value)


def test_auc_of_changing_candidates_is_refused(evaluated: Runs) -> None:
    run = evaluated("offer", candidates="available")
    compare_runs([run], ["mean_rank", "ndcg@10"], resamples=100)
    with pytest.raises(FindRecError, match="auc cannot be compared"):
        compare_runs([run], ["auc"], resamples=100)
