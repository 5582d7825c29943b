"""Robustness suites: the reference level equals the plain evaluation; other levels alter the inputs."""

from __future__ import annotations

import io
import json
from pathlib import Path

import numpy as np
import pytest
import torch
from rich.console import Console
from saved_run import MAX_LENGTH, save_run

from findrec.baseline_configs import BASELINES as UNTRAINED
from findrec.datasets.batches.catalogue import Catalogue
from findrec.datasets.folder.data_folder import DataFolder
from findrec.datasets.folder.in_memory import write_data_folder
from findrec.errors import FindRecError
from findrec.evaluation.protocol import RankingProtocol
from findrec.evaluation.ranking.evaluate import evaluate_scorers
from findrec.evaluation.run import run_suites
from findrec.evaluation.scoring.base import Scorer
from findrec.evaluation.scoring.inner_product import TextKNN
from findrec.evaluation.scoring.load import load_scorer
from findrec.evaluation.scoring.users import UserBlock
from findrec.evaluation.suites.display import format_suite, suite_figure
from findrec.evaluation.suites.inputs import longest_history
from findrec.evaluation.suites.suites import METRICS, Suite, read_suites, run_suite, write_suite
from findrec.training.runs import read_run_config, training_jobs

NUM_ITEMS, NUM_USERS = 60, 40
BASELINES = "evaluation.baselines=[popularity, cooccurrence, own_frequent, text_knn, sasrec]"


def some_histories(rng: np.random.Generator) -> list[list[int]]:
    return [rng.integers(1, NUM_ITEMS, size=int(rng.integers(3, 40))).tolist() for _ in range(NUM_USERS)]


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> DataFolder:
    rng = np.random.default_rng(0)
    features = {name: rng.standard_normal((NUM_ITEMS, width)) for name, width in (("text", 6), ("image", 5))}
    features["image"][::5] = np.nan
    path = tmp_path_factory.mktemp("data") / "small"
    return write_data_folder(path, some_histories(rng), features=features, num_items=NUM_ITEMS)


@pytest.fixture(scope="module")
def run(data: DataFolder, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Content is scored too, and features were wrong in training already: both must be kept."""
    model = {"dim": 16, "stream": {"layers": 1}}
    path = tmp_path_factory.mktemp("runs") / "small"
    path.mkdir()
    return save_run(path, data, BASELINES, "data.feature_noise=0.2", model=model)


@pytest.fixture(scope="module")
def plain(data: DataFolder, run: Path) -> dict[str, dict[str, float]]:
    """The plain evaluation's rows of the two kinds of models and of a baseline of each kind."""
    from findrec.evaluation.scoring.baselines import make_baseline

    jobs = training_jobs(read_run_config(run), run)
    scorers: list[Scorer] = [load_scorer(job, data) for job in jobs]
    scorers += [
        make_baseline(UNTRAINED[n](name=n), data)
        for n in ("popularity", "cooccurrence", "own_frequent", "text_knn")
    ]
    rows, _ = evaluate_scorers(scorers, data, RankingProtocol(max_length=MAX_LENGTH), splits=["test"])
    return {row["model"]: row for row in rows["test"]}


@pytest.fixture(scope="module")
def suites(run: Path) -> dict[str, Suite]:
    levels = {"noise": [50, 100], "missing": [50, 100], "length": [1, 5]}
    return {kind: run_suite(run, kind, levels=levels[kind], draws=2, resamples=200) for kind in levels}


@pytest.mark.parametrize(
    ("kind", "models"),
    [
        ("noise", ["findrec", "text_knn"]),
        ("missing", ["findrec", "text_knn"]),
        ("length", ["findrec", "sasrec", "popularity", "cooccurrence", "own_frequent", "text_knn"]),
    ],
)
def test_reference_level_equals_the_plain_evaluation(
    kind: str, models: list[str], suites: dict[str, Suite], plain: dict[str, dict[str, float]]
) -> None:
    suite = suites[kind]
    assert [curve.model for curve in suite.curves] == models
    assert suite.protocol == plain["findrec"]["protocol"]
    assert suite.cases == plain["findrec"]["cases"]
    for curve in suite.curves:
        assert len({point.level for point in curve.points}) == 3
        for metric in METRICS:
            (point,) = (point for point in curve.of(metric) if point.level == curve.reference)
            assert point.value == plain[curve.model][metric], "not a digit differs"
            assert (point.change, point.change_low, point.change_high, point.p) == (0, 0, 0, 1)
            for other in curve.of(metric):
                assert other.low <= other.value <= other.high
                assert other.change == pytest.approx(other.value - point.value, abs=1e-15)
        moved = [point.value != curve.of("mrr")[0].value for point in curve.of("mrr")]
        assert any(moved) or curve.model == "popularity", "what is varied reaches the model"


def test_missing_everything_equals_no_features(suites: dict[str, Suite], data: DataFolder) -> None:
    """Text neighbours without texts know nothing: every item ties, at the middle of the catalogue."""
    (text,) = (curve for curve in suites["missing"].curves if curve.model == "text_knn")
    (point,) = (point for point in text.of("mrr") if point.level == 100)
    assert point.value == pytest.approx(1 / (1 + (data.num_items - 1) / 2))


def test_altered_catalogue(data: DataFolder) -> None:
    whole, ids = Catalogue(data, ["text", "image"]), torch.arange(NUM_ITEMS + 1)
    for same in (whole.altered(), whole.altered(noise=0.0, missing=0.0, seed=4)):
        for name, rows in same.features(ids).items():
            assert torch.equal(rows.values, whole.features(ids)[name].values)
    swapped = [whole.altered(noise=p, seed=1).features(ids)["text"].values for p in (0.2, 0.5, 1.0)]
    original = whole.features(ids)["text"].values
    differs = [(actual != original).any(dim=1) for actual in swapped]
    assert [int(part.sum()) for part in differs] == [12, 30, 60]
    for actual in swapped:
        assert sorted(map(tuple, actual.tolist())) == sorted(map(tuple, original.tolist())), "nothing is lost"
    dropped = [whole.altered(missing=p, seed=1).features(ids) for p in (0.2, 0.5, 1.0)]
    gone = {name: [~actual[name].present for actual in dropped] for name in ("text", "image")}
    assert [int(part[1:].sum()) for part in gone["text"]] == [12, 30, 60]
    for parts in (differs, gone["text"], gone["image"]):
        assert bool((parts[0] <= parts[1]).all()), "more is altered, nothing less"
    assert not torch.equal(
        gone["text"][0][1:] & whole.features(ids)["image"].present[1:], gone["image"][0][1:]
    )
    for features in dropped:
        for rows in features.values():
            assert not rows.values[~rows.present].any()
    assert not torch.equal(whole.altered(missing=0.5, seed=2).features(ids)["text"].present, ~gone["text"][1])
    assert whole.features(ids)["text"].present[1:].all(), "the original is untouched"


@pytest.mark.parametrize("length", [1, 5, 100])
def test_shortened_histories_equal_short_data(data: DataFolder, tmp_path: Path, length: int) -> None:
    users = np.arange(NUM_USERS)
    block = UserBlock.read(data, "test", users, MAX_LENGTH).shortened(length)
    past = data.histories(users, np.zeros(NUM_USERS, dtype=np.int64), data.test_start)
    for user in users:
        own = past.item[past.offset[user] : past.offset[user + 1]]
        actual = block.item[block.offset[user] : block.offset[user + 1]]
        assert actual.tolist() == own[-length:].tolist()
    whole = UserBlock.read(data, "test", users, MAX_LENGTH)
    knn = TextKNN(data)
    same = torch.equal(knn.queries(block).users_Bd, knn.queries(whole).users_Bd)
    assert same == (length >= 5)


def test_learned_positions_limit_the_levels(run: Path, data: DataFolder) -> None:
    suite = run_suite(run, "length", resamples=200)
    levels = {curve.model: [point.level for point in curve.of("mrr")] for curve in suite.curves}
    longest = longest_history(data)
    assert MAX_LENGTH < 20 < longest
    assert levels["sasrec"] == [MAX_LENGTH]
    assert levels["findrec"] == [MAX_LENGTH, 20, longest]
    assert levels["popularity"] == [20, longest]


def test_suites_are_written_read_and_printed(run: Path, suites: dict[str, Suite], tmp_path: Path) -> None:
    for suite in suites.values():
        path = write_suite(tmp_path, suite)
        before = path.read_bytes()
        assert write_suite(tmp_path, suite).read_bytes() == before
        console = Console(width=200, record=True, file=io.StringIO())
        console.print(format_suite(suite))
        text = console.export_text()
        assert all(curve.model in text for curve in suite.curves)
        assert "leave-one-out, full catalogue (60 items)" in text
        assert f"{suite.curves[0].points[0].value:.4f}" in text
        assert len(suite_figure(suite).axes) == 2
    assert read_suites(tmp_path) == list(suites.values())
    path.write_text(json.dumps({"kind": "length"}))
    with pytest.raises(FindRecError, match=r"damaged.*--suite length"):
        read_suites(tmp_path)


def test_files_of_a_run(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    written = run_suites(run, ["noise"], [30])
    names = [path.relative_to(run).as_posix() for path in written]
    assert names == ["suites/noise.json", "plots/suite-noise.png", "plots/suite-noise.svg", "report.html"]
    assert all(path.stat().st_size > 1000 for path in written)
    assert "Wrong features" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("kind", "levels", "message"),
    [
        ("noice", [], "did you mean 'noise'"),
        ("noise", [101], "0 to 100"),
        ("missing", [-1], "0 to 100"),
        ("length", [0], "1 or more"),
    ],
)
def test_errors_are_reported(run: Path, kind: str, levels: list[int], message: str) -> None:
    with pytest.raises(FindRecError, match=message):
        run_suite(run, kind, levels=levels)


def test_levels_need_a_suite(run: Path) -> None:
    with pytest.raises(FindRecError, match="add --suite noise"):
        run_suites(run, [], [5])


def test_a_run_without_features_is_refused(tmp_path: Path) -> None:
    bare = write_data_folder(tmp_path / "data", some_histories(np.random.default_rng(1)), num_items=NUM_ITEMS)
    (tmp_path / "run").mkdir()
    run = save_run(tmp_path / "run", bare, "evaluation.baselines=[popularity]")
    with pytest.raises(FindRecError, match=r"nothing in .* uses features.*has none"):
        run_suite(run, "noise")
