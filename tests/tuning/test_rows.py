"""The rows of a leaderboard are trained with the best values of their trials."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import yaml

from findrec.config import RunConfig
from findrec.errors import FindRecError
from findrec.evaluation.leaderboard.config import Leaderboard, load_leaderboard
from findrec.tuning import rows as tuned_rows
from findrec.tuning.rows import tune_rows
from findrec.tuning.space import Space
from findrec.tuning.study import tuning_folder
from findrec.tuning.trials import Trial


@pytest.fixture
def leaderboard(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Leaderboard:
    monkeypatch.setenv("FINDREC_HOME", str(tmp_path))
    tree = {
        "name": "small",
        "base": {"model": {"name": "sasrec", "dim": 8}},
        "seeds": [3, 4],
        "data": {"films": {"data.folder": "films"}},
        "rows": {"one layer": {"model.layers": 1}, "two layers": {"model.layers": 2}},
        "reference": "one layer",
        "budget": {"trials": 5},
    }
    (tmp_path / "table.yaml").write_text(yaml.safe_dump(tree, sort_keys=False))
    return load_leaderboard(tmp_path / "table.yaml")


def test_all_seeds_have_the_best_values_of_the_first(
    leaderboard: Leaderboard, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked = []

    def study(config: RunConfig, space: Space, *, trials: int) -> list[Trial]:
        asked.append((config.name, config.training.seed, trials))
        tuning_folder(config).mkdir(parents=True)
        layers = config.model.model_dump()["layers"]
        good: dict[str, Any] = {
            "model.dim": 32 * layers,
            "model.dropout": 0.1,
            "model.heads": 2,
            "training.tokens": 800,
            "training.optim.lr": 0.01 * layers,
            "training.optim.weight_decay": 0.01,
        }
        assert good.keys() == space.keys.keys()
        bad = good | {"model.dim": 4}
        return [Trial("a", bad, 0.0, "trained", 0.1, 3), Trial("b", good, 1.0, "stopped", 0.2, 3)]

    monkeypatch.setattr(tuned_rows, "run_study", study)
    tuned = tune_rows(leaderboard, "findrec leaderboard table.yaml")
    assert asked == [("one-layer-s3", 3, 5), ("two-layers-s3", 3, 5)]
    assert [(run.row, run.seed) for run in tuned.runs] == [(run.row, run.seed) for run in leaderboard.runs]
    for run in tuned.runs:
        layers = 1 if run.row == "one layer" else 2
        assert run.config.model.dim == run.tree["model"]["dim"] == 32 * layers
        assert run.config.training.optim.lr == 0.01 * layers
        assert run.config.training.seed == run.seed
        assert run.config.data.folder == "films"
        assert (tuning_folder(tuned.of("films", run.row)[0].config) / "best.yaml").is_file()


def test_other_budgets_need_no_trials(leaderboard: Leaderboard, tmp_path: Path) -> None:
    tree = yaml.safe_load((tmp_path / "table.yaml").read_text()) | {"budget": {"epochs": 2}}
    (tmp_path / "table.yaml").write_text(yaml.safe_dump(tree))
    other = load_leaderboard(tmp_path / "table.yaml")
    assert tune_rows(other, "c") is other
    with pytest.raises(FindRecError, match="set one of epochs, seconds and trials"):
        load_leaderboard(tmp_path / "table.yaml", ["budget.trials=3"])
