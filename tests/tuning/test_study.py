"""`findrec tune`, for real: trials on a cluster, continued after an interruption, and refused."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest
import yaml
from clusters import environment
from planted import planted_folder

from findrec.cli.app import main
from findrec.config import RunConfig, load_config, parse_config
from findrec.errors import Preempted
from findrec.tuning import study
from findrec.tuning.space import Range, Space
from findrec.tuning.study import distributions, first_points, first_values
from findrec.tuning.trials import TRIALS, Trial, read_trials, trial_name, write_trial

SPACE = {"training.optim.lr": {"low": 0.003, "high": 0.03, "log": True}, "model.dim": [8, 16]}


@pytest.fixture
def home(tmp_path: Path) -> Path:
    """A home with a small data set, a run and a search space."""
    planted_folder(tmp_path / "data" / "planted", num_users=60)
    tree = {
        "name": "tiny",
        "data": {"folder": "data/planted", "max_length": 16},
        "model": {"name": "sasrec", "dim": 16, "layers": 1, "heads": 1},
        "training": {"epochs": 3, "microbatches": 2, "tokens": 128, "optim": {"lr": 0.01}},
        "cluster": {"workers": 1, "threads": 1, "gpu": False},
    }
    (tmp_path / "run.yaml").write_text(yaml.safe_dump(tree))
    (tmp_path / "space.yaml").write_text(yaml.safe_dump(SPACE))
    return tmp_path


def tune(home: Path, *arguments: str) -> str:
    command = [sys.executable, "-m", "findrec.cli", "tune", "run.yaml", "--space", "space.yaml", *arguments]
    done = subprocess.run(
        command, env=environment(home), cwd=home, capture_output=True, text=True, timeout=600
    )
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-4000:]
    return done.stdout


@pytest.mark.ray
@pytest.mark.slow
@pytest.mark.cluster
def test_trials_are_run_once_and_continued(home: Path) -> None:
    folder = home / "runs" / "tiny-tuning"
    assert "0 of 2 trials have ended" in tune(home, "--trials", "2")
    given, other = read_trials(folder)
    assert given.values == {"training.optim.lr": 0.01, "model.dim": 16}  # the configuration as it is
    assert (given.ended, given.epochs) == ("trained", 3)
    assert other.ended in ("trained", "stopped")
    assert 0 < (given.best or 0) <= 1
    assert load_config(str(folder / "best.yaml"), []).name == "tiny-tuned"
    # The second one as an interruption leaves it, inside its second epoch.
    path = folder / "trials" / other.name
    (path / "trial.json").write_text(
        json.dumps({"values": dict(other.values), "started": other.started, "ended": None})
    )
    for checkpoint in sorted((path / "checkpoints").glob("step-*"))[1:]:
        shutil.rmtree(checkpoint)
    said = tune(home, "--trials", "3")
    assert "1 of 3 trials have ended" in said
    again = read_trials(folder)
    assert [trial.name for trial in again[:2]] == [given.name, other.name]
    assert len(again) == 3
    assert again[0] == given
    assert again[1].started == other.started
    assert all(trial.ended in ("trained", "stopped") for trial in again)
    if again[1].epochs == other.epochs:
        assert again[1].best == other.best  # bit for bit as without the interruption
    report = json.loads((folder / "report.json").read_text())
    assert report["best"]["value"] == max(trial.best or 0 for trial in again)
    assert not (folder / "session").exists()
    assert "3 of 3 trials have ended" in tune(home, "--trials", "3")
    assert read_trials(folder) == again


def test_mistakes_end_with_code_2_before_trials(
    home: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("FINDREC_HOME", str(home))
    run, space = str(home / "run.yaml"), str(home / "space.yaml")
    assert main(["tune", run, "training.epoch=3"]) == 2
    assert "did you mean 'training.epochs'" in capsys.readouterr().err
    assert main(["tune", run, "--space", "nothing.yaml"]) == 2
    assert "nothing.yaml cannot be read" in capsys.readouterr().err
    assert main(["tune", run, "data.folder=nowhere", "--space", space]) == 2
    assert "nowhere" in capsys.readouterr().err
    assert not (home / "runs").exists()


def test_another_configuration_is_not_mixed_in(
    home: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("FINDREC_HOME", str(home))
    folder = home / "runs" / "tiny-tuning"
    trial = folder / "trials" / "trial-1"
    trial.mkdir(parents=True)
    (trial / "trial.json").write_text(json.dumps({"values": {}, "started": 0.0, "ended": "trained"}))
    config = load_config(str(home / "run.yaml"), []).model_dump(mode="json")
    space = SPACE | {"training.optim.lr": SPACE["training.optim.lr"]}
    (folder / "tuning.yaml").write_text(yaml.safe_dump({"config": config, "space": space}))
    arguments = ["tune", str(home / "run.yaml"), "--space", str(home / "space.yaml"), "--trials", "1"]
    assert main([*arguments, "training.epochs=4"]) == 2
    said = capsys.readouterr().err
    assert "has trials of another configuration or search space (config.training.epochs differ)" in said
    assert "--fresh" in said


def test_the_space_of_optuna_is_the_same() -> None:
    space = Space(
        {
            "a": Range(low=0.1, high=0.2, log=True),
            "b": Range(low=1, high=3),
            "c": ("x", "y"),
        }
    )
    made = distributions(space)
    assert vars(made["a"]) == {"low": 0.1, "high": 0.2, "log": True, "step": None}
    assert vars(made["b"]) == {"low": 1, "high": 3, "log": False, "step": 1}
    assert vars(made["c"]) == {"choices": ("x", "y")}


def test_the_configuration_is_a_trial_if_the_space_has_it() -> None:
    config = parse_config({"model": {"name": "sasrec", "dim": 16}})
    space = Space({"model.dim": (8, 16), "model.dropout": Range(low=0.0, high=0.5)})
    assert first_values(config, space) == {"model.dim": 16, "model.dropout": 0.2}
    assert first_values(config, Space({"model.dim": (8, 32)})) is None


def test_a_small_space_is_tried_completely() -> None:
    config = parse_config({"model": {"name": "sasrec", "dim": 16}})
    space = Space({"model.dim": (8, 16, 32)})
    given, small, large = ({"model.dim": dim} for dim in (16, 8, 32))
    assert first_points(config, space, [], 2) == [given]
    assert first_points(config, space, [], 3) == [given, small, large]
    known = [
        Trial(trial_name(small), small, 0.0, "trained", 0.1, 3),
        Trial(trial_name(large), large, 1.0, None, None, 0),
    ]
    assert first_points(config, space, known, 3) == [large, given]
    assert first_points(config, space, known, 2) == [large]


def test_a_small_space_ends(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []

    def fit(config: RunConfig, space: Space, data: str, folder: Path, *rest: Any) -> None:
        asked.append(rest)
        for values in space.combinations():
            write_trial(folder / TRIALS / trial_name(values), values, "trained")

    monkeypatch.setenv("FINDREC_HOME", str(home))
    monkeypatch.setattr(study, "ray_session", lambda _: nullcontext())
    monkeypatch.setattr(study, "_fit", fit)
    config, space = load_config(str(home / "run.yaml"), []), Space({"model.dim": (8, 16)})
    for _ in range(2):
        assert len(study.run_study(config, space, trials=30)) == 2
    assert asked == [([], 2)]


@pytest.mark.parametrize("compiled", [False, True])
def test_sigterm_ends_the_trials_although_errors_are_caught(
    compiled: bool, home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fit(*_: object) -> None:
        try:
            os.kill(os.getpid(), signal.SIGTERM)
            time.sleep(60)
        except Exception:
            pytest.fail("Ray Tune would take it for an error of the trials")
        except BaseException as error:  # as if Python had been inside of compiled code
            if compiled:
                raise SystemError("returned a result with an exception set") from error
            raise

    monkeypatch.setenv("FINDREC_HOME", str(home))
    monkeypatch.setattr(study, "ray_session", lambda _: nullcontext())
    monkeypatch.setattr(study, "_fit", fit)
    config, space = load_config(str(home / "run.yaml"), []), Space({"model.dim": (8, 16)})
    with pytest.raises(Preempted, match="continue from their checkpoints"):
        study.run_study(config, space, trials=2)
