"""What HM4SR is for, on planted data whose answers are known; each model is trained once, in seconds."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from planted import planted_folder
from trained_model import train_model

from findrec.datasets.folder.data_folder import DataFolder
from findrec.datasets.folder.in_memory import write_data_folder
from findrec.models.base import DataFacts
from findrec.models.hm4sr.model import HM4SR

NUM_ITEMS = 20
MINUTE, DAY = 60, 86_400
MODEL: dict[str, Any] = {"name": "hm4sr", "layers": 1, "interactive": {"experts": 2}}
IDS: dict[str, Any] = MODEL | {"modalities": [], "tasks": {"id_contrast": 0}}


def write_timed(path: Path, kind: str) -> DataFolder:
    """The next item is one of two successors of an item, as the time of the item decides.

    `interval`: the time since the event before it, a minute or a week. `calendar`: whether it is in the
    morning or in the evening; intervals are whole days and half days, so half of each tell nothing.
    """
    rng = np.random.default_rng(0)
    follows = np.stack([rng.permutation(NUM_ITEMS), rng.permutation(NUM_ITEMS)])
    histories, times = [], []
    for _ in range(150):
        item, time = int(rng.integers(NUM_ITEMS)), 1_500_000_000 // DAY * DAY
        state = int(rng.integers(2))
        time += (8 + 12 * state) * 3600 if kind == "calendar" else 0
        items, seconds = [item], [time]
        for _ in range(int(rng.integers(8, 15))):
            item = int(follows[state, item])
            new = int(rng.integers(2))
            if kind == "interval":
                time += (MINUTE, 7 * DAY)[new]
            else:
                time += int(rng.integers(1, 5)) * DAY + (new - state) * DAY // 2
            state = new
            items.append(item)
            seconds.append(time)
        histories.append(np.array(items) + 1)
        times.append(np.array(seconds))
    text = np.random.default_rng(1).normal(size=(NUM_ITEMS, 8))
    return write_data_folder(path, histories, times, features={"text": text}, num_items=NUM_ITEMS)


@pytest.mark.parametrize("kind", ["interval", "calendar"])
def test_temporal_experts_learn_what_times_decide(tmp_path: Path, kind: str) -> None:
    folder = write_timed(tmp_path / "data", kind)
    with_times = train_model(folder, tmp_path / "with", IDS | {"temporal": {"reads": kind}}, epochs=15)
    without = train_model(folder, tmp_path / "without", IDS | {"temporal": {"experts": 0}}, epochs=15)
    assert with_times.hits() > 0.9
    assert without.hits() < 0.65  # it knows both successors, and guesses one
    assert without.hits(2) > 0.9


def test_temporal_experts_are_trained_and_saved(tmp_path: Path) -> None:
    """In the public code they are not among the parameters, and keep the values they were drawn with."""
    folder = write_timed(tmp_path / "data", "interval")
    model = train_model(folder, tmp_path / "run", MODEL, epochs=1).model
    facts = DataFacts(folder.num_items, feature_dims={"text": 8}, max_length=16)
    assert "temporal.scale" in model.state_dict()
    torch.manual_seed(0)
    drawn = HM4SR(model.config, facts).temporal
    assert drawn is not None
    moved = (model.temporal.scale - drawn.scale).abs()
    assert moved.min() > 0
    assert moved.mean() > 0.01


def test_users_are_learned_by_heart(tmp_path: Path) -> None:
    """All parts together: the whole model fits 100 users whose next items are determined."""
    folder = planted_folder(tmp_path / "data", num_users=100)
    assert train_model(folder, tmp_path / "run", MODEL, epochs=15).hits() > 0.95


def test_categories_are_predicted_for_items_that_training_never_saw(tmp_path: Path) -> None:
    """Texts tell the category; the prediction is learned from items of histories, and holds for others."""
    rng = np.random.default_rng(0)
    num_items, groups = 120, 4
    group = rng.integers(groups, size=num_items)
    text = rng.normal(size=(groups, 12))[group] + 0.3 * rng.normal(size=(num_items, 12))
    features = {"text": text, "genre": np.eye(groups)[group]}
    seen = num_items // 2
    histories = [rng.integers(seen, size=12) + 1 for _ in range(60)]
    folder = write_data_folder(tmp_path / "data", histories, features=features, num_items=num_items)
    trained = train_model(folder, tmp_path / "run", MODEL | {"categories": "genre"}, epochs=6)
    catalogue = trained.catalogue.all_features("cpu")
    with torch.no_grad():
        latent_Vd = trained.model.content.encode(catalogue)["text"]
        x_VSd = torch.stack([trained.rows_Vw, latent_Vd], dim=1) * trained.model.inputs.scale
        predicted_V = trained.model.category.predict(x_VSd.flatten(1)).argmax(1)
    unseen_V = torch.arange(1 + seen, 1 + num_items)
    right = predicted_V[unseen_V] == catalogue["genre"].values[unseen_V].argmax(1)
    assert trained.model.names == ["text"]  # categories are no input
    assert right.float().mean() > 0.9
