"""Models with a vector for each user are validated, loaded and served by these vectors."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from planted import planted_folder, planted_run

from findrec.datasets.folder.data_folder import DataFolder
from findrec.errors import FindRecError
from findrec.evaluation.metrics.metrics import summarise
from findrec.evaluation.protocol import RankingProtocol
from findrec.evaluation.ranking.evaluate import rank_split
from findrec.evaluation.scoring.load import load_ranker
from findrec.serving.export.export import export_run
from findrec.serving.recommender import Recommender
from findrec.tables.base import ITEMS, USERS
from findrec.training.checkpoints.checkpoint import Checkpoint, load_checkpoint
from findrec.training.checkpoints.validations import best_checkpoint_path
from findrec.training.runs import main_job, read_run_config


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> DataFolder:
    return planted_folder(tmp_path_factory.mktemp("users") / "data", num_users=40)


@pytest.fixture(scope="module")
def run(folder: DataFolder, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("runs") / "users"
    model = {"name": "toy_models:RankedUsers", "dim": 8}
    return planted_run(path, folder, model, {"epochs": 2, "microbatches": 2})


def best(run: Path) -> Checkpoint:
    path = best_checkpoint_path(run / "checkpoints")
    assert path is not None
    return load_checkpoint(path)


def test_ranks_are_by_the_vectors_of_the_checkpoint(folder: DataFolder, run: Path) -> None:
    config, saved = read_run_config(run), best(run)
    protocol = RankingProtocol.of(config, folder)
    ranks = rank_split(load_ranker(main_job(config, run), folder), folder, "valid", protocol)
    users, items = (saved.tables[name]["weight"].double() for name in (USERS, ITEMS))
    scores = users[1 + torch.from_numpy(ranks.user)] @ items[1:].T
    target = torch.from_numpy(ranks.target)[:, None] - 1
    greater = (scores > scores.gather(1, target)).sum(1)
    assert ranks.greater.tolist() == greater.tolist()
    row = summarise(ranks, folder, "valid", protocol, model="users")
    assert row["ndcg@10"] == pytest.approx(saved.state.best)  # of the validation in training


def test_it_is_exported_with_its_users_only(run: Path, tmp_path: Path) -> None:
    with pytest.raises(FindRecError, match=r"without its users \(try --users.*no table of users"):
        export_run(run, tmp_path / "without")
    exported, recommender = (
        Recommender.load(export_run(run, tmp_path / "with", users=True)),
        Recommender.load(run),
    )
    users = recommender.user_ids[:4]
    assert np.array_equal(exported.user_vectors(users), recommender.user_vectors(users))


def test_visitors_are_folded_in_from_the_distinct_items_of_their_history(run: Path) -> None:
    recommender = Recommender.load(run)
    tables = best(run).tables
    items = tables[ITEMS]["weight"]
    known = recommender.user_vectors(recommender.user_ids[3:5])
    assert np.array_equal(known, tables[USERS]["weight"][4:6].numpy())
    rows = [9, 2, 9, 5]
    history = [recommender.item_ids[row - 1] for row in rows]
    visitors = recommender.user_vectors(histories=[history, history[:1]])
    expected = items[[9, 2, 5]].mean(0).flip(0)
    torch.testing.assert_close(torch.from_numpy(visitors[0]), expected)
    torch.testing.assert_close(torch.from_numpy(visitors[1]), items[9].flip(0))
