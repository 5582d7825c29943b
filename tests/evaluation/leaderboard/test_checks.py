"""What is found before anything is trained."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from saved_run import save_run

from findrec.datasets.folder.data_folder import DataFolder
from findrec.errors import FindRecError
from findrec.evaluation.leaderboard.checks import check_leaderboard
from findrec.evaluation.leaderboard.config import load_leaderboard
from findrec.training.checkpoints.checkpoint import checkpoint_folder, latest_checkpoint, load_checkpoint
from findrec.training.runs import run_folder

Write = Callable[..., Path]


def test_data_is_opened_and_weights_are_counted(write: Write, folder: DataFolder) -> None:
    leaderboard = load_leaderboard(write())
    checked = check_leaderboard(leaderboard)
    assert checked.folders["films"].location == folder.location
    run = leaderboard.of("films", "twice as wide")[0]
    saved = latest_checkpoint(checkpoint_folder(save_run(run_folder(run.config), folder, **run.tree)))
    checkpoint = load_checkpoint(saved)
    rows = checkpoint.table.num_rows - 1  # without padding
    tower = sum(weight.numel() for weight in checkpoint.tower.values())
    assert checked.weights["films", "twice as wide"] == tower + 16 * rows


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        ({"data": {"shops": {"data.folder": "nowhere"}}}, "data set 'shops' .* cannot be opened: .*nowhere"),
        ({"baselines": [{"name": "text_knn", "modality": "smell"}]}, "text_knn.*smell"),
        ({"baselines": [{"name": "ease", "max_items": 3}]}, "ease inverts .*max_items=3 are not accepted"),
        (
            {"rows": {"narrow": {}, "b": {"evaluation.mask_seen": True}}},
            "row 'b' on films: evaluation.mask_seen is True, but False in the rest",
        ),
        (
            {"rows": {"narrow": {}, "b": {"evaluation.candidates": "available"}}},
            "row 'b' on films: evaluation.candidates is 'available', but 'all'",
        ),
        (
            {"rows": {"narrow": {}, "b": {"data.folder": "elsewhere"}}},
            "row 'b' on films: data is '.*elsewhere",
        ),
        ({"rows": {"narrow": {}, "b": {"model.events": True}}}, "row 'b' on films: .*no event types"),
        ({"rows": {"narrow": {}, "b": {"training.warm_start": "gone"}}}, "row 'b' on films: .*'gone'"),
    ],
)
def test_what_cannot_be_trained_or_compared_is_refused(
    keys: dict[str, Any], message: str, write: Write
) -> None:
    leaderboard = load_leaderboard(write(**keys))
    with pytest.raises(FindRecError, match=message):
        check_leaderboard(leaderboard)


def test_only_the_models_of_rows_must_fit_the_data(write: Write) -> None:
    other = {"model": {"name": "sasrec", "events": True}}  # which the data lacks
    path = write(base=other, rows={"narrow": {"model.events": False}}, baselines=["popularity"])
    assert check_leaderboard(load_leaderboard(path)).weights.keys() == {("films", "narrow")}
