"""Runs that do not fit their data are refused before anything is trained."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from planted import make_config, planted_folder

from findrec.config import parse_config
from findrec.datasets.folder.data_folder import DataFolder
from findrec.datasets.folder.in_memory import write_data_folder
from findrec.errors import FindRecError
from findrec.evaluation.check import check_run


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> DataFolder:
    made: DataFolder = planted_folder(tmp_path_factory.mktemp("check") / "data", num_users=20)
    return made


def changed(**evaluation: Any) -> Any:
    tree = make_config().model_dump(mode="json")
    return parse_config(tree | {"evaluation": tree["evaluation"] | evaluation})


def test_a_valid_run_passes(folder: DataFolder) -> None:
    check_run(changed(baselines=["popularity", "text_knn", "sasrec", "toy_models:TwoStages"]), folder)


@pytest.mark.parametrize(
    ("evaluation", "says"),
    [
        ({"baselines": [{"name": "text_knn", "modality": "texts"}]}, r"text_knn .* 'texts', .*did you mean"),
        ({"baselines": [{"name": "sasrec", "heads": 5}]}, "heads"),
        (
            {"baselines": [{"name": "ease", "max_items": 9}]},
            "ease inverts a matrix .* items with training events",
        ),
        ({"baselines": [{"name": "findrec", "label": "b", "modalities": ["sound"]}]}, "'sound'"),
        ({"candidates": ["colour=red"]}, "no column 'colour'"),
        ({"candidates": ["raw=nothing"]}, "no item of .* has that value"),
    ],
)
def test_mistakes_are_refused(folder: DataFolder, evaluation: dict[str, Any], says: str) -> None:
    with pytest.raises(FindRecError, match=says):
        check_run(changed(**evaluation), folder)


def test_data_without_test_users_is_refused(tmp_path: Path) -> None:
    text = np.random.default_rng(0).normal(size=(9, 4))
    folder = write_data_folder(tmp_path / "data", [[1]] * 3, num_items=9, features={"text": text})
    with pytest.raises(FindRecError, match=r"no user of .* can be tested"):
        check_run(changed(), folder)
