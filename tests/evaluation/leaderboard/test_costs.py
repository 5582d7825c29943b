"""The cost of a training, from logs with known times."""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import pytest

from findrec.config import RunConfig, parse_config
from findrec.evaluation.leaderboard.costs import Cost, cost_of
from findrec.training.checkpoints.validations import Validation, record_validation
from findrec.training.runs import run_folder, training_jobs


@pytest.fixture
def config(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> RunConfig:
    monkeypatch.setenv("FINDREC_HOME", str(tmp_path))
    return parse_config({"model": {"name": "sasrec"}, "evaluation": {"baselines": []}})


def write(folder: Path, lines: Iterable[dict[str, Any]]) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "metrics.jsonl").write_text("".join(json.dumps({"time": 0.0} | one) + "\n" for one in lines))


def steps(first: int, last: int, seconds: float) -> list[dict[str, Any]]:
    """Steps of 30 targets, each of `seconds`."""
    return [
        {"step": n, "epoch": 0, "train/targets": 30, "train/seconds": seconds} for n in range(first, last + 1)
    ]


def test_time_speed_and_memory(config: RunConfig) -> None:
    folder = run_folder(config)
    assert cost_of(config) is None
    lines = [
        *steps(1, 10, 0.5),
        {"step": 10, "epoch": 0, "memory/worker_peak_gib": 0.5, "memory/gpu_peak_gib": 2.0},
        {"step": 10, "epoch": 1, "valid/ndcg@10": 0.10},
        *steps(11, 20, 0.5),
        {"step": 20, "epoch": 1, "memory/worker_peak_gib": 0.7, "memory/gpu_peak_gib": 1.5},
        {"step": 20, "epoch": 2, "valid/ndcg@10": 0.19},  # 95 % of the best
        *steps(21, 40, 0.5),
        {"step": 40, "epoch": 3, "valid/ndcg@10": 0.20},
    ]
    write(folder, lines)
    assert cost_of(config) == Cost(20.0, 60.0, 10.0, 0.7, 2.0)
    write(folder, [line for line in lines if "valid/ndcg@10" not in line])
    assert cost_of(config) == Cost(20.0, 60.0, None, 0.7, 2.0)
    for step, value in ((10, 0.3), (20, 0.31)):  # of the asynchronous evaluator
        values = {"ndcg@10": value, "recall@10": 0.5, "mrr": 0.1}
        record_validation(folder, Validation(step, step // 10, "digest", values))
    assert cost_of(config) == Cost(20.0, 60.0, 5.0, 0.7, 2.0)


def test_earlier_stages_count(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FINDREC_HOME", str(tmp_path))
    model = {"name": "toy_models:TwoStages"}
    config = parse_config({"model": model, "evaluation": {"baselines": []}})
    first, last = training_jobs(config, run_folder(config))
    write(last.folder, [*steps(1, 10, 0.5), {"step": 10, "epoch": 1, "valid/ndcg@10": 0.2}])
    assert cost_of(config) is None  # the time of the first is unknown
    write(first.folder, [*steps(1, 8, 1.0), {"step": 8, "epoch": 0, "memory/worker_peak_gib": 3.0}])
    assert cost_of(config) == Cost(13.0, 60.0, 13.0, 3.0, None)
