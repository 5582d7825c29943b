"""What BiVRec is for, on planted data whose answers are known; each model is trained once, in seconds."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from planted import planted_folder
from torch import Tensor
from trained_model import MAX_LENGTH, Trained, train_model

from findrec.datasets.batches.evaluation import evaluated_users, evaluation_batch
from findrec.datasets.folder.data_folder import DataFolder
from findrec.datasets.folder.in_memory import write_data_folder

GROUPS, EACH = 4, 10
MODEL: dict[str, Any] = {"name": "bivrec", "layers": 1, "interests": {"number": 4}}


def write_interests(path: Path) -> DataFolder:
    """Users are interested in two groups of items and move between them; texts tell the group."""
    rng = np.random.default_rng(0)
    histories = []
    for _ in range(150):
        own = rng.choice(GROUPS, size=2, replace=False)
        group = rng.choice(own, size=int(rng.integers(10, 16)))
        histories.append(group * EACH + rng.integers(EACH, size=len(group)) + 1)
    num_items = GROUPS * EACH
    text = np.repeat(rng.normal(size=(GROUPS, 12)), EACH, axis=0) + 0.3 * rng.normal(size=(num_items, 12))
    return write_data_folder(path, histories, features={"text": text}, num_items=num_items)


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Trained:
    path = tmp_path_factory.mktemp("bivrec")
    return train_model(write_interests(path / "data"), path / "run", MODEL, epochs=12)


@torch.no_grad()
def allocations(trained: Trained) -> tuple[list[Tensor], Tensor]:
    """The interest that each view allocates each event of the test histories to, and the event's group."""
    folder, model = trained.folder, trained.model
    batch, _ = evaluation_batch(folder, "test", evaluated_users(folder, "test"), MAX_LENGTH)
    features = trained.catalogue.features(batch.ids)
    inputs = [model.inputs(batch, trained.rows_Vw[batch.ids])]
    inputs += [x[batch.index] * model.inputs.scale for x in model._content_vectors(features)]
    valid = batch.item > 0
    logits = [view(x)[1][valid].argmax(-1) for view, x in zip(model.views, inputs, strict=True)]
    return logits, (batch.item[valid] - 1) // EACH


def information(one_n: Tensor, two_n: Tensor) -> float:
    """The mutual information of two labels over the entropy of the second: 0 none, 1 all."""
    joint = torch.zeros(int(one_n.max()) + 1, int(two_n.max()) + 1, dtype=torch.float64)
    joint.index_put_((one_n, two_n), torch.ones(len(one_n), dtype=torch.float64), accumulate=True)
    joint /= joint.sum()
    outer = joint.sum(1, keepdim=True) * joint.sum(0)
    entropy = -(joint.sum(0) * joint.sum(0).clamp(min=1e-12).log()).sum()
    return float((joint * (joint.clamp(min=1e-12) / outer.clamp(min=1e-12)).log()).sum() / entropy)


def test_interests_are_those_that_the_data_was_made_of(trained: Trained) -> None:
    views, group = allocations(trained)
    for view in views:
        assert information(view, group) > 0.5
    assert trained.hits(20) > 0.98  # the items of the user's two groups come before all others


def test_the_views_agree_where_they_are_asked_to(trained: Trained, tmp_path: Path) -> None:
    """Not by themselves: each view may number its interests in its own way."""
    off = {"overall": 0, "allocation": 0, "views": 0}
    apart = train_model(trained.folder, tmp_path / "run", MODEL | {"losses": off}, epochs=12)
    assert information(*allocations(trained)[0]) > 0.8
    assert information(*allocations(apart)[0]) < 0.6


def test_interests_are_wrong_where_their_maximum_is_not_trained(trained: Trained, tmp_path: Path) -> None:
    """The catalogue's loss sees the interest of the target only; others may score any item."""
    without = train_model(trained.folder, tmp_path / "run", MODEL | {"losses": {"maximum": 0}}, epochs=12)
    assert without.hits(20) < trained.hits(20) - 0.1


@torch.no_grad()
def test_the_ranking_is_by_the_exact_maximum_over_interests(trained: Trained) -> None:
    ranks = trained.ranks()
    users = evaluated_users(trained.folder, "test")
    batch, cases = evaluation_batch(trained.folder, "test", users, MAX_LENGTH)
    h_TKv = trained.model(batch, trained.rows_Vw[batch.ids], trained.catalogue.features(batch.ids)).h
    vectors = trained.model.item_vectors(trained.rows_Vw, trained.catalogue)
    score_TV = torch.einsum("tkv,nv->tkn", h_TKv.double(), vectors.double()).amax(1)[:, 1:]
    own_T = score_TV.gather(1, cases.target[:, None] - 1)
    better = dict(zip(cases.user.tolist(), (1 + (score_TV > own_T).sum(1)).tolist(), strict=True))
    assert h_TKv.shape[1] == 4
    assert [better[user] for user in ranks.user.tolist()] == ranks.rank.tolist()


def test_users_are_learned_by_heart(tmp_path: Path) -> None:
    folder = planted_folder(tmp_path / "data", num_users=100)
    assert train_model(folder, tmp_path / "run", MODEL, epochs=10).hits() > 0.95
