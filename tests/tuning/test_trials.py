"""The files of trials: what a trial is named by, and what is read of it."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from findrec.config import parse_config
from findrec.errors import FindRecError
from findrec.training.runs import run_folder
from findrec.tuning.trials import TRIALS, read_trials, trial_config, trial_name, write_trial


def test_a_trial_is_named_by_its_values() -> None:
    assert trial_name({"a": 1, "b": 0.5}) == trial_name({"b": 0.5, "a": 1})
    assert trial_name({"a": 1}) != trial_name({"a": 2}) != trial_name({"b": 2})


def test_a_trial_is_trained_by_one_worker_without_baselines(tmp_path: Path) -> None:
    base = parse_config({"model": "sasrec", "cluster": {"workers": 2}, "evaluation": {"evaluator": "async"}})
    tree = base.model_dump(mode="json")
    tree["training"]["checkpoint_store"] = "s3://bucket/checkpoints"
    config = trial_config(tree, {"model.dim": 16, "training.optim.lr": 0.1}, tmp_path)
    assert (config.model.dim, config.training.optim.lr) == (16, 0.1)
    assert (config.cluster.workers, config.evaluation.evaluator, config.baselines) == (1, "inline", [])
    assert not config.tracking.enabled
    assert config.training.checkpoint_store is None  # another tuning may try the same values
    assert run_folder(config) == tmp_path / TRIALS / trial_name({"model.dim": 16, "training.optim.lr": 0.1})
    with pytest.raises(FindRecError, match=r"a trial: model.dim"):
        trial_config(tree, {"model.dim": 1}, tmp_path)


def test_trials_are_read_in_their_order(tmp_path: Path) -> None:
    assert read_trials(tmp_path) == []
    for n in (2, 1, 3):
        write_trial(tmp_path / TRIALS / trial_name({"n": n}), {"n": n})
    lines = [
        {"step": 3, "epoch": 0, "train/loss": 1.0},
        {"step": 3, "epoch": 1, "valid/ndcg@10": 0.2},
        {"step": 6, "epoch": 2, "valid/ndcg@10": 0.1},
    ]
    folder = tmp_path / TRIALS / trial_name({"n": 1})
    (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    before = read_trials(tmp_path)
    write_trial(folder, {"n": 1}, "stopped")
    second, first, third = read_trials(tmp_path)
    assert [trial.values for trial in (second, first, third)] == [{"n": 2}, {"n": 1}, {"n": 3}]
    assert (first.ended, first.best, first.epochs) == ("stopped", 0.2, 2)
    assert (third.ended, third.best, third.epochs) == (None, None, 0)
    assert [trial.started for trial in before] == [trial.started for trial in (second, first, third)]
    (folder / "trial.json").write_text("{")
    with pytest.raises(FindRecError, match=r"trial.json cannot be read"):
        read_trials(tmp_path)
