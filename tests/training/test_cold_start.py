"""Items without events are ranked by content, if configured, far better than by chance."""

import numpy as np
import pytest
import torch
from planted import make_config

from findrec.datasets.folder.in_memory import write_data_folder
from findrec.evaluation.protocol import RankingProtocol
from findrec.evaluation.ranking.evaluate import rank_split
from findrec.evaluation.scoring.inner_product import ModelScorer, TextKNN
from findrec.evaluation.validation import validate
from findrec.models.base import SequenceModel
from findrec.tables.base import ITEMS
from findrec.training.build import build_catalogue, build_tables, build_tower_model
from findrec.training.loop import run_training
from findrec.training.tower import PlainTower
from findrec.training.worker import Worker

GROUPS, EACH = 10, 12  # items of a group share their text up to noise; the last two of each are cold
NUM_ITEMS = GROUPS * EACH


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A user stays with a group; the last event, never trained on, is one of the group's cold items."""
    rng = np.random.default_rng(0)
    centres = rng.normal(size=(GROUPS, 16))
    text = np.repeat(centres, EACH, axis=0) + 0.3 * rng.normal(size=(NUM_ITEMS, 16))
    histories = []
    for _ in range(240):
        group = int(rng.integers(GROUPS))
        warm = group * EACH + rng.integers(EACH - 2, size=9)
        cold = group * EACH + EACH - 2 + rng.integers(2)
        histories.append(np.append(warm, cold) + 1)
    path = tmp_path_factory.mktemp("cold") / "data"
    return write_data_folder(path, histories, features={"text": text}, num_items=NUM_ITEMS)


def recall_at_10(scorer, folder):
    ranks = rank_split(
        scorer, folder, "test", RankingProtocol(users_per_block=64, max_length=16, mask_seen=True)
    )
    return float(np.mean(ranks.rank <= 10))


def trained(folder, tmp_path, kind, modalities):
    config = make_config(epochs=15, loss={"kind": kind, "negatives": 64})
    tree = {
        **config.model_dump(),
        "model": {**config.model.model_dump(), "modalities": modalities, "repeat": False},
    }
    config = type(config).model_validate(tree)
    torch.manual_seed(0)
    model, table = build_tower_model(config, folder), build_tables(config, folder)[ITEMS]
    tower = PlainTower(model, config.training.optim)
    run_training(config, folder, tmp_path, tower, {ITEMS: table}, worker=Worker(), validate=validate)
    assert isinstance(model, SequenceModel)
    return ModelScorer(
        model, table.weight, build_catalogue(config, folder), max_length=16, device="cpu", name="model"
    )


@pytest.mark.parametrize("kind", ["exact", "sampled"])
def test_cold_items_are_ranked_well_only_by_content(folder, tmp_path, kind):
    assert (folder.train_count[1:].reshape(GROUPS, EACH)[:, -2:] == 0).all()
    chance = 10 / NUM_ITEMS
    assert recall_at_10(TextKNN(folder), folder) > 0.9  # that the content tells
    with_content = trained(folder, tmp_path / "with", kind, ["text"])
    assert recall_at_10(with_content, folder) > 5 * chance
    if kind == "exact":
        without = trained(folder, tmp_path / "without", kind, [])
        assert recall_at_10(without, folder) < 2 * chance
