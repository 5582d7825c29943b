"""A small leaderboard, and its runs with weights drawn at random instead of learnt."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml
from saved_run import save_run

from findrec.datasets.folder.data_folder import DataFolder
from findrec.datasets.folder.in_memory import write_data_folder
from findrec.evaluation.leaderboard.checks import Checked, check_leaderboard
from findrec.evaluation.leaderboard.config import Leaderboard, load_leaderboard
from findrec.evaluation.leaderboard.table import DataTable, make_tables
from findrec.evaluation.run import evaluate_run
from findrec.training.runs import run_folder

Write = Callable[..., Path]


@pytest.fixture(scope="session")
def folder(histories: list[list[int]], tmp_path_factory: pytest.TempPathFactory) -> DataFolder:
    """The histories of `small_run`, where the last items of twelve users are in nobody else's history."""
    path: Path = tmp_path_factory.mktemp("data") / "small"
    cold = [[*items, 60 + n] if n < 12 else items for n, items in enumerate(histories)]
    text = np.random.default_rng(1).standard_normal((80, 6)).astype(np.float32)
    return write_data_folder(path, cold, features={"text": text}, num_items=80)


def table_tree(folder: Path | str) -> dict[str, Any]:
    """A leaderboard as plain values, of two models on one data set."""
    return {
        "name": "small",
        "base": {
            "model": {"name": "sasrec", "dim": 8, "layers": 1},
            "training": {"epochs": 1},
            "cluster": {"threads": 1},
            "tracking": {"enabled": False},
            "data": {"max_length": 12},
        },
        "seeds": [0, 1],
        "data": {"films": {"data.folder": str(folder)}},
        "rows": {"narrow": None, "twice as wide": {"model.dim": 16}},
        "reference": "narrow",
    }


@pytest.fixture
def write(folder: DataFolder, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Write:
    """Write the file of `table_tree` with other keys; the home of its runs is the test's own."""
    monkeypatch.setenv("FINDREC_HOME", str(tmp_path))

    def make(**keys: Any) -> Path:
        path = tmp_path / "table.yaml"
        path.write_text(yaml.safe_dump(table_tree(folder.path) | keys, sort_keys=False))
        return path

    return make


@pytest.fixture(scope="module")
def finished(
    folder: DataFolder, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[tuple[Leaderboard, Checked]]:
    """A leaderboard whose runs have checkpoints and results, with baselines and suites still to be made."""
    home: Path = tmp_path_factory.mktemp("home")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("FINDREC_HOME", str(home))
        more = {
            "rows": {"narrow": {}, "wide|r": {"model.dim": 16}},
            "baselines": ["popularity", "text_knn"],
            "suites": {"noise": [50], "length": [3]},
            "metrics": ["ndcg@10", "recall@5"],
            "published": [
                {
                    "name": "GRU",
                    "metrics": {"ndcg@10": 0.9},
                    "source": "A. Author (2020)",
                    "comparable": True,
                },
                {
                    "name": "narrow",  # as one of the rows
                    "metrics": {"ndcg@10": 0.8, "recall@5": 0.85, "mrr": 0.7},
                    "source": "<b>Author</b> (2021)",
                    "comparable": False,
                    "note": "other split",
                },
            ],
        }
        path = home / "table.yaml"
        path.write_text(yaml.safe_dump(table_tree(folder.path) | more, sort_keys=False))
        leaderboard = load_leaderboard(path)
        checked = check_leaderboard(leaderboard)
        for run in leaderboard.runs:
            evaluate_run(save_run(run_folder(run.config), folder, **run.tree), show=False)
        yield leaderboard, checked


@pytest.fixture(scope="module")
def table(finished: tuple[Leaderboard, Checked]) -> DataTable:
    """Its table."""
    (table,) = make_tables(*finished, resamples=300)
    return table
