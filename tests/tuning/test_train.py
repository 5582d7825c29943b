"""One trial, in this process: what it reports, how it continues, and how it ends."""

from __future__ import annotations

import shutil
import threading
from collections import defaultdict
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import ray
import ray.tune
from planted import make_config, planted_folder

from findrec.datasets.folder.data_folder import DataFolder
from findrec.training.checkpoints.checkpoint import checkpoint_folder, list_checkpoints, read_state
from findrec.training.logs.metrics_log import read_lines
from findrec.tuning import train as train_module
from findrec.tuning.train import run_trial
from findrec.tuning.trials import TRIALS, read_trials, trial_name, write_trial

Run = Callable[..., list[tuple[int, float]]]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> DataFolder:
    made: DataFolder = planted_folder(tmp_path_factory.mktemp("planted") / "data", num_users=40)
    return made


@pytest.fixture
def run(folder: DataFolder, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Run:
    """Run a trial with these values; returns the epochs and metrics that it reports."""

    def trial(values: dict[str, Any], **model: Any) -> list[tuple[int, float]]:
        reports: list[tuple[int, float]] = []
        monkeypatch.setattr(ray, "get_gpu_ids", lambda: [])
        monkeypatch.setattr(
            ray.tune, "report", lambda given: reports.append((given["epoch"], given["ndcg@10"]))
        )
        tree = make_config(epochs=3).model_dump(mode="json")
        tree["cluster"]["threads"] = 1
        if model:
            tree["model"] = model
        run_trial(values, tree=tree, data=str(folder.path), tuning=str(tmp_path))
        return reports

    return trial


def test_a_trial_reports_the_best_so_far_and_continues(run: Run, tmp_path: Path) -> None:
    values = {"training.optim.lr": 0.02, "model.dim": 16}
    reports = run(values)
    assert [epoch for epoch, _ in reports] == [1, 2, 3]
    metrics = [metric for _, metric in reports]
    assert metrics == sorted(metrics)
    (trial,) = read_trials(tmp_path)
    assert (trial.values, trial.ended, trial.best) == (values, "trained", metrics[-1])
    checkpoints = sorted((tmp_path / TRIALS / trial.name / "checkpoints").glob("step-*"))
    for path in checkpoints[:-1]:
        shutil.rmtree(path)
    assert run(values) == reports  # of the log: nothing is left to train
    write_trial(tmp_path / TRIALS / trial.name, values)  # as if it had been interrupted
    assert run(values) == reports
    write_trial(tmp_path / TRIALS / trial.name, values)
    shutil.rmtree(checkpoints[-1])
    assert run(values) == reports  # trained again, bit for bit


def test_a_trial_that_diverges_ends_with_what_it_reached(run: Run, tmp_path: Path) -> None:
    reports = run({"training.optim.lr": 1e30, "training.optim.clip_tower": 0.0})
    assert reports == [(1, 0.0)]
    (trial,) = read_trials(tmp_path)
    assert (trial.ended, trial.best) == ("diverged", None)


def test_only_the_ranked_stage_reports(run: Run, tmp_path: Path) -> None:
    values = {"training.optim.lr": 0.01}
    reports = run(values, name="toy_models:TwoStages", dim=16, stage_epochs=1)
    assert [epoch for epoch, _ in reports] == [1, 2, 3]
    assert (tmp_path / TRIALS / trial_name(values) / "stages" / "edges" / "checkpoints").is_dir()


def test_a_ranked_earlier_stage_does_not_report_and_is_continued(run: Run, tmp_path: Path) -> None:
    values = {"training.optim.lr": 0.01}
    reports = run(values, name="toy_models:Continued", dim=16)
    folder = tmp_path / TRIALS / trial_name(values)
    lines = [line for line in read_lines(folder / "metrics.jsonl") if "valid/ndcg@10" in line]
    best = [max(line["valid/ndcg@10"] for line in lines[: n + 1]) for n in range(3)]
    assert reports == list(zip((1, 2, 3), best, strict=True))
    first = folder / "stages" / "first"
    assert any("valid/ndcg@10" in line for line in read_lines(first / "metrics.jsonl"))
    started_from = read_state(list_checkpoints(checkpoint_folder(folder))[-1]).started_from
    assert Path(started_from).is_relative_to(first)


def test_equal_trials_side_by_side_are_trained_once(
    run: Run, folder: DataFolder, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    values, trainings = {"training.optim.lr": 0.02}, []
    reports: dict[int, list[tuple[int, float]]] = defaultdict(list)
    run_training, both = train_module.run_training, threading.Barrier(2)

    def counted(*arguments: Any, **keys: Any) -> Any:
        trainings.append(threading.get_ident())
        return run_training(*arguments, **keys)

    def report(given: dict[str, float]) -> None:
        reports[threading.get_ident()].append((int(given["epoch"]), given["ndcg@10"]))

    def trial() -> None:
        both.wait(timeout=60)
        run_trial(values, tree=tree, data=str(folder.path), tuning=str(tmp_path))

    monkeypatch.setattr(ray, "get_gpu_ids", lambda: [])
    monkeypatch.setattr(ray.tune, "report", report)
    monkeypatch.setattr(train_module, "run_training", counted)
    tree = make_config(epochs=2).model_dump(mode="json")
    tree["cluster"]["threads"] = 1
    with ThreadPoolExecutor(2) as pool:
        for done in [pool.submit(trial), pool.submit(trial)]:
            done.result(timeout=120)
    assert len(trainings) == 1
    first, second = reports.values()
    assert first == second
    assert [epoch for epoch, _ in first] == [1, 2]
