"""VBPR and BPR-MF against their equations in float64, and what they learn."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pairs_on_workers as small
import pytest
import torch
from forked import forked
from planted import planted_folder, planted_run
from torch import Tensor

from findrec.config import LossConfig, OptimConfig
from findrec.datasets.batches.edges import Edges
from findrec.datasets.batches.training_pairs import TrainingPairs
from findrec.datasets.folder.data_folder import DataFolder
from findrec.datasets.folder.features import ModalRows
from findrec.models.base import Microbatch
from findrec.models.configs import choose_model
from findrec.models.vbpr.model import VBPR, ridge_map
from findrec.serving.recommender import Recommender
from findrec.tables.base import ITEMS, USERS
from findrec.tables.item_table import ItemTable
from findrec.tables.table_spec import TableSpec
from findrec.training.checkpoints.checkpoint import latest_checkpoint, load_checkpoint
from findrec.training.objectives import run_microbatch
from findrec.training.tower import PlainTower
from findrec.training.worker import Worker

DIM, CONTENT, L2 = 5, 4, 0.05
WIDTHS = {"text": 7, "image": 3}


class FewFeatures:
    """Features of the small items, of lengths other than 1; some items lack a modality."""

    def __init__(self, modalities: list[str]) -> None:
        generator = torch.Generator().manual_seed(3)
        self.values = {
            name: 3 * torch.randn(small.NUM_ITEMS + 1, WIDTHS[name], generator=generator)
            for name in modalities
        }
        self.present = {name: torch.ones(small.NUM_ITEMS + 1, dtype=torch.bool) for name in modalities}
        for number, name in enumerate(modalities):
            self.present[name][[0, 3 + number]] = False

    def features(self, ids: Tensor) -> Mapping[str, ModalRows]:
        return {name: ModalRows(self.values[name][ids], self.present[name][ids]) for name in self.values}

    def all_features(self, device: object, part: range | None = None) -> Mapping[str, ModalRows]:
        return self.features(torch.arange(small.NUM_ITEMS + 1))


def model(modalities: list[str]) -> VBPR:
    torch.manual_seed(5)
    keys = {"dim": DIM, "content_dim": CONTENT, "l2": L2, "negatives": 2, "modalities": modalities}
    config = choose_model({"name": "vbpr", **keys})
    return VBPR(config, small.facts({name: WIDTHS[name] for name in modalities}))  # type: ignore[arg-type]


def rows(network: VBPR, modalities: list[str]) -> dict[str, Tensor]:
    """Rows of both tables, float64, padding zero."""
    generator = torch.Generator().manual_seed(0)
    shapes = VBPR.tables(network.config, small.facts({name: WIDTHS[name] for name in modalities}))
    made = {
        name: torch.randn(shape.num_rows + 1, shape.dim, generator=generator, dtype=torch.float64)
        for name, shape in shapes.items()
    }
    for values in made.values():
        values[0] = 0
    return made


def score(
    user: Tensor, item: Tensor, weights: Mapping[str, Tensor], features: FewFeatures, number: int
) -> Tensor:
    """Equation 4, without what cancels; `weights` are E and, in the last row, beta', by modality."""
    total = user[:DIM] @ item[:DIM] + item[DIM]
    for name, weight in weights.items():
        if features.present[name][number]:
            values = features.values[name][number].double()
            values = values / values.norm()
            total = total + user[DIM:] @ (weight[:-1] @ values) + weight[-1] @ values
    return total


def projections(network: VBPR) -> dict[str, Tensor]:
    """Copies of E and beta' in float64, by modality."""
    return {name: part.weight.detach().double() for name, part in network.project.items()}  # type: ignore[union-attr]


@pytest.mark.parametrize("modalities", [[], ["text"], ["text", "image"]], ids="+".join)
def test_the_loss_and_its_gradients_are_those_of_the_equations(modalities: list[str]) -> None:
    """Two microbatches of one step: their sum is the mean over all edges."""
    optim, network, features = OptimConfig(), model(modalities), FewFeatures(modalities)
    values, weights = rows(network, modalities), projections(network)
    tables = {}
    for name, each in values.items():
        spec = TableSpec(len(each) - 1, each.shape[1], seed=0, loss=LossConfig(), optim=optim, name=name)
        tables[name] = ItemTable(spec)
        tables[name].weight.copy_(each)
    edges, tower = small.edges(), PlainTower(network.train(), optim)
    count = len(edges.user)
    found = torch.zeros(())
    for part in (slice(0, 5), slice(5, count)):
        some = Edges(edges.user[part], edges.item[part], edges.negative[part])
        microbatch: Any = Microbatch(some, features, num_targets=count, num_microbatches=2, seed=0)
        found = found + run_microbatch(tower, tables, microbatch).total.detach()

    for tensor in (*values.values(), *weights.values()):
        tensor.requires_grad_()
    users, items = values[USERS], values[ITEMS]
    want = torch.zeros((), dtype=torch.float64)
    for user, item, negatives in zip(
        edges.user.tolist(), edges.item.tolist(), edges.negative.tolist(), strict=True
    ):
        for negative in negatives:
            liked, other = (score(users[user], items[i], weights, features, i) for i in (item, negative))
            norms = users[user].square().sum() + items[item].square().sum() + items[negative].square().sum()
            want = want - (liked - other).sigmoid().log() + L2 / 2 * norms
    want = want / (2 * count)
    want.backward()  # type: ignore[no-untyped-call]
    torch.testing.assert_close(found.double(), want.detach(), rtol=1e-5, atol=0)
    for name, table in tables.items():
        assert values[name].grad is not None
        _, gradient = table._local.gradient()
        torch.testing.assert_close(gradient[1:].double(), values[name].grad[1:], rtol=1e-4, atol=1e-6)
    for name, weight in weights.items():
        found_grad = dict(network.named_parameters())[f"project.{name}.weight"].grad
        assert found_grad is not None
        torch.testing.assert_close(found_grad.double(), weight.grad, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("modalities", [[], ["text", "image"]], ids="+".join)
def test_ranked_vectors_have_the_scores_of_the_equations(modalities: list[str]) -> None:
    """Items 6 and 9 have no training events: their rows do not count."""
    network, features = model(modalities).eval(), FewFeatures(modalities)
    values, weights = rows(network, modalities), projections(network)
    tables = {name: each.float() for name, each in values.items()}
    with torch.no_grad():
        vectors = network.user_item_vectors(tables, features)
    assert vectors.known_U.tolist() == [False, True, True, False, True, True, True]
    assert vectors.items_Vd.shape[1] == network.config.vector_dim(modalities)
    values[ITEMS][[6, 9]] = 0
    for user in range(1, small.NUM_USERS + 1):
        for item in range(1, small.NUM_ITEMS + 1):
            want = score(values[USERS][user], values[ITEMS][item], weights, features, item)
            found = vectors.users_Ud[user] @ vectors.items_Vd[item]
            torch.testing.assert_close(found.double(), want, rtol=1e-5, atol=1e-5)


def test_visitors_are_folded_in_by_the_ridge_regression_of_the_users() -> None:
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(50, 4, generator=generator, dtype=torch.float64)
    true = torch.randn(4, 4, generator=generator, dtype=torch.float64)
    y = x @ true + 0.1 * torch.randn(50, 4, generator=generator, dtype=torch.float64)
    penalty = 0.01 * x.square().sum(0).mean()
    stacked = torch.cat([x, penalty.sqrt() * torch.eye(4, dtype=torch.float64)])
    want = torch.linalg.lstsq(stacked, torch.cat([y, torch.zeros(4, 4, dtype=torch.float64)])).solution
    torch.testing.assert_close(ridge_map(x, y).double(), want, rtol=1e-4, atol=1e-5)
    assert not ridge_map(x[:0], y[:0]).any()

    network = model([])
    tables = {name: each.float() for name, each in rows(network, []).items()}
    vectors = network.user_item_vectors(tables, FewFeatures([]))
    items = vectors.items_Vd[:, :DIM]
    known = [user for user, own in enumerate(small.ITEMS_OF_USERS, start=1) if own]
    means = torch.stack([items[small.ITEMS_OF_USERS[user - 1]].mean(0) for user in known])
    fitted = ridge_map(means, tables[USERS][known])
    history = [2, 7, 8]
    found = vectors.fold_in(vectors.folded_Ve[history].sum(0)[None], torch.tensor([3.0]))
    torch.testing.assert_close(found[0, :DIM], items[history].mean(0) @ fitted)
    assert found[0, DIM] == 1
    assert vectors.fold_in(torch.zeros(1, DIM), torch.zeros(1)).isfinite().all()


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> DataFolder:
    made: DataFolder = planted_folder(tmp_path_factory.mktemp("planted") / "data", num_users=100)
    return made


@pytest.mark.parametrize("modalities", [[], "all"], ids=["bpr-mf", "all"])
def test_it_overfits_the_items_of_a_hundred_users(
    folder: DataFolder, tmp_path: Path, modalities: object
) -> None:
    """The first item of every user's list is one of the training events, and nearly all of the first are."""
    training = {
        "epochs": 25,
        "microbatches": 2,
        "tokens": 256,
        "eval_every": 25,
        "optim": {"lr": 0.05, "weight_decay": 0.0},
    }
    tree = {"name": "vbpr", "dim": 48, "content_dim": 16, "l2": 0.0, "negatives": 4, "modalities": modalities}
    recommender = Recommender.load(planted_run(tmp_path / "run", folder, tree, training))
    scores = torch.from_numpy(recommender.user_vectors(folder.user_ids) @ recommender.item_vectors().T)
    pairs = TrainingPairs.read(folder)
    own = torch.zeros(scores.shape, dtype=torch.bool)
    own[pairs.user, pairs.item - 1] = True
    order = scores.argsort(dim=1, descending=True)
    assert own.gather(1, order[:, :1]).float().mean() >= 0.99
    precision = [own[u, order[u, :count]].float().mean() for u, count in enumerate(own.sum(1).tolist())]
    assert torch.stack(precision).mean() > 0.9
    # A visitor with the history of a user gets a similar list.
    raw = [[recommender.item_ids[int(v)] for v in own[u].nonzero()[:, 0]] for u in range(20)]
    visitors = torch.from_numpy(recommender.user_vectors(histories=raw) @ recommender.item_vectors().T)
    first = visitors.argmax(1)
    assert own[torch.arange(20), first].float().mean() > 0.9


def test_two_workers_train_the_same_tables_as_one(folder: DataFolder, tmp_path: Path) -> None:
    tree = {"name": "vbpr", "dim": 8, "modalities": []}
    training = {"epochs": 2, "microbatches": 4, "loss": {"kind": "sampled"}}
    small.train(small.training_config(tree, **training), folder, tmp_path / "one", Worker())
    arguments = (str(tmp_path / "meeting"), str(folder.path), str(tmp_path / "two"), tree, training)
    with forked(small.work, 2, *arguments):
        pass
    one, two = (latest_checkpoint(tmp_path / name) for name in ("one", "two"))
    assert one is not None
    assert two is not None
    wanted, result = load_checkpoint(one), load_checkpoint(two)
    assert result.state.best == pytest.approx(wanted.state.best, rel=1e-3)
    for name in (ITEMS, USERS):
        for part in ("weight", "exp_avg", "exp_avg_sq"):
            torch.testing.assert_close(
                result.tables[name][part], wanted.tables[name][part], rtol=1e-4, atol=1e-5
            )
