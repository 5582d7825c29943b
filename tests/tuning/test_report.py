"""The report of a tuning, from trials with a known answer."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from findrec.config import RunConfig, load_config, parse_config
from findrec.errors import FindRecError
from findrec.tuning.report import best_trial, importances, write_report
from findrec.tuning.space import Range, Space
from findrec.tuning.study import tuning_folder
from findrec.tuning.trials import Trial

SPACE = Space(
    {
        "training.optim.lr": Range(low=0.001, high=0.1, log=True),
        "model.dropout": Range(low=0.0, high=0.5),
        "model.dim": (8, 16, 32),
    }
)


def trials(count: int = 40) -> list[Trial]:
    """Trials whose metric depends much on the learning rate, a little on the width, not on dropout."""
    rng = np.random.default_rng(0)
    made = []
    for n in range(count):
        lr, dropout = 10 ** rng.uniform(-3, -1), rng.uniform(0, 0.5)
        dim = int(rng.choice([8, 16, 32]))
        best = 0.2 - 0.05 * abs(np.log10(lr) + 2) + 0.001 * dim
        values = {"training.optim.lr": float(lr), "model.dropout": float(dropout), "model.dim": dim}
        made.append(Trial(f"trial-{n}", values, float(n), "trained" if n % 2 else "stopped", float(best), 3))
    return made


@pytest.fixture
def config(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> RunConfig:
    monkeypatch.setenv("FINDREC_HOME", str(tmp_path))
    tree = {"name": "shop", "model": {"name": "sasrec", "dim": 8, "dropout": 0.25}}
    config = parse_config(tree | {"training": {"optim": {"lr": 0.01}}})
    tuning_folder(config).mkdir(parents=True)
    return config


def test_keys_are_important_by_what_they_change() -> None:
    shares = importances(SPACE, trials())
    assert shares is not None
    assert sum(shares.values()) == pytest.approx(1)
    assert shares["training.optim.lr"] > 0.5 > shares["model.dim"] > 2 * shares["model.dropout"]
    assert importances(SPACE, trials(3)) is None
    failed = [Trial(f"{n}", trials()[n].values, 0.0, "failed", None, 0) for n in range(9)]
    assert importances(SPACE, [*trials(3), *failed]) is None


def test_the_report_names_the_best_and_writes_its_configuration(config: RunConfig) -> None:
    given = {"training.optim.lr": 0.01, "model.dropout": 0.25, "model.dim": 8}
    failed = Trial("trial-bad", trials()[0].values | {"model.dim": 16}, 50.0, "failed", None, 0)
    made = [Trial("trial-given", given, -1.0, "trained", 0.1, 3), *trials(), failed]
    best = max(made, key=lambda trial: trial.best or 0)
    assert best_trial(made) == best
    markdown, figures, path = write_report(config, SPACE, made, "findrec tune shop")
    tuned = load_config(str(path), [])
    assert tuned.name == "shop-tuned"
    assert tuned.training.optim.lr == best.values["training.optim.lr"]
    assert (tuned.model.dim, tuned.training.epochs) == (best.values["model.dim"], config.training.epochs)
    assert "workers" not in tuned.cluster.model_fields_set  # decided by the machine
    text, tree = markdown.read_text(), json.loads(figures.read_text())
    assert "42 trials: 21 trained, 20 stopped, 1 failed" in text
    assert f"Best: {best.best:.4f} after 3 epochs, `{best.name}`" in text
    assert "The configuration as given: 0.1000." in text
    keys = [line.split("`")[1] for line in text.splitlines() if line.startswith("| `")]
    assert keys[0] == "training.optim.lr"
    assert sorted(keys) == sorted(SPACE.keys)
    assert tree["importances"] == importances(SPACE, made)
    assert tree["best"]["values"] == best.values
    assert len(tree["trials"]) == 42
    rows = [line for line in text.splitlines() if line.startswith("| trial-")]
    assert rows[0].startswith(f"| {best.name} | {best.best:.4f} | 3 |")
    assert len(rows) == 20
    (edge,) = [line for line in text.splitlines() if line.startswith("| `model.dim`")]
    assert "the best is at an end: widen it" in edge


def test_without_a_validated_trial_there_is_no_report(config: RunConfig) -> None:
    with pytest.raises(FindRecError, match="no trial was validated"):
        write_report(config, SPACE, [Trial("a", {}, 0.0, "failed", None, 0)], "c")
