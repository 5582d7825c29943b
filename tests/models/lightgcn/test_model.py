"""LightGCN against its equations with dense matrices in float64, and what it learns."""

from __future__ import annotations

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
from findrec.models.base import Microbatch
from findrec.models.configs import choose_model
from findrec.models.lightgcn.model import LightGCN
from findrec.serving.recommender import Recommender
from findrec.tables.base import ITEMS, USERS
from findrec.tables.item_table import ItemTable
from findrec.tables.table_spec import TableSpec
from findrec.training.checkpoints.checkpoint import latest_checkpoint, load_checkpoint
from findrec.training.objectives import run_microbatch
from findrec.training.tower import PlainTower
from findrec.training.worker import Worker

DIM, LAYERS, L2 = 6, 3, 0.05
Nodes = tuple[Tensor, Tensor]


def model(**keys: object) -> LightGCN:
    config = choose_model({"name": "lightgcn", "dim": DIM, "layers": LAYERS, "l2": L2, **keys})
    return LightGCN(config, small.facts())  # type: ignore[arg-type]


def rows() -> Nodes:
    """Rows of both tables, float64, padding zero."""
    generator = torch.Generator().manual_seed(0)
    users, items = (
        torch.randn(count + 1, DIM, generator=generator, dtype=torch.float64)
        for count in (small.NUM_USERS, small.NUM_ITEMS)
    )
    users[0], items[0] = 0, 0
    return users, items


def dense_layers(users: Tensor, items: Tensor, edges: Tensor | None = None) -> list[Nodes]:
    """Layers 0..K of users and items, by the normalised adjacency matrix of all nodes."""
    edges = small.matrix() if edges is None else edges
    num_users = len(edges)
    adjacency = torch.zeros(sum(edges.shape), sum(edges.shape), dtype=torch.float64)
    adjacency[:num_users, num_users:], adjacency[num_users:, :num_users] = edges, edges.T
    scale = adjacency.sum(1).clamp(min=1).rsqrt()
    adjacency = scale[:, None] * adjacency * scale
    layers = [torch.cat([users, items])]
    for _ in range(LAYERS):
        layers.append(adjacency @ layers[-1])
    return [(layer[:num_users], layer[num_users:]) for layer in layers]


def mean(layers: list[Nodes]) -> Nodes:
    of_users, of_items = zip(*layers, strict=True)
    return torch.stack(of_users).mean(0), torch.stack(of_items).mean(0)


def test_propagation_and_its_gradient_are_those_of_dense_matrices() -> None:
    users, items = (x.requires_grad_() for x in rows())
    network = model()
    want = mean(dense_layers(users, items))
    found = network.propagated(users, items)
    for one, other in zip(found, want, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-6, atol=1e-6)
    assert torch.autograd.gradcheck(network.propagated, (users, items))


def test_rows_that_changed_are_propagated_again() -> None:
    network, (users, items) = model(), rows()
    first = network.propagated(users, items)
    again = network.propagated(users.clone(), items.clone())
    assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))
    items[5, 2] += 1.0
    torch.testing.assert_close(
        network.propagated(users, items)[0], mean(dense_layers(users, items))[0], rtol=1e-6, atol=1e-6
    )


def test_the_loss_and_its_gradients_are_those_of_the_equations() -> None:
    """Two microbatches of one step: their sum is the mean over all edges."""
    optim = OptimConfig()
    tables = {
        name: ItemTable(TableSpec(count, DIM, seed=0, loss=LossConfig(), optim=optim, name=name))
        for name, count in ((USERS, small.NUM_USERS), (ITEMS, small.NUM_ITEMS))
    }
    users, items = rows()
    for table, values in zip(tables.values(), (users, items), strict=True):
        table.weight.copy_(values)
    edges, tower = small.edges(), PlainTower(model(negatives=2).train(), optim)
    count = len(edges.user)
    found = torch.zeros(())
    for part in (slice(0, 5), slice(5, count)):
        some = Edges(edges.user[part], edges.item[part], edges.negative[part])
        microbatch: Any = Microbatch(some, None, num_targets=count, num_microbatches=2, seed=0)  # type: ignore[arg-type]
        found = found + run_microbatch(tower, tables, microbatch).total

    users.requires_grad_()
    items.requires_grad_()
    all_users, all_items = mean(dense_layers(users, items))
    want = torch.zeros((), dtype=torch.float64)
    for user, item, negatives in zip(edges.user, edges.item, edges.negative, strict=True):
        for negative in negatives:
            margin = all_users[user] @ (all_items[item] - all_items[negative])
            norms = users[user].square().sum() + items[item].square().sum() + items[negative].square().sum()
            want = want - margin.sigmoid().log() + L2 / 2 * norms
    want = want / (2 * count)
    want.backward()  # type: ignore[no-untyped-call]
    torch.testing.assert_close(found.double(), want.detach(), rtol=1e-5, atol=0)
    for table, values in zip(tables.values(), (users, items), strict=True):
        assert values.grad is not None
        _, gradient = table._local.gradient()
        torch.testing.assert_close(gradient[1:].double(), values.grad[1:], rtol=1e-4, atol=1e-6)


def test_visitors_are_one_more_user_of_unchanged_items() -> None:
    users, items = rows()
    items[[6, 9]] = 0  # items without training events have no vector
    history = [2, 5, 7, 4]
    vectors = model().user_item_vectors({USERS: users, ITEMS: items}, None)  # type: ignore[arg-type]
    layers = dense_layers(users, items)
    degree = small.matrix().sum(0)
    want = torch.zeros(DIM, dtype=torch.float64)
    for _, of_items in layers[:-1]:
        for item in history:
            want += of_items[item] / (degree[item] * len(history)).sqrt() / (LAYERS + 1)
    total = vectors.folded_Ve[history].sum(0)[None]
    found = vectors.fold_in(total, torch.tensor([float(len(history))]))
    torch.testing.assert_close(found[0], want, rtol=1e-6, atol=1e-6)
    assert not vectors.items_Vd[[6, 9]].any()
    assert vectors.known_U.tolist() == [False, True, True, False, True, True, True]
    torch.testing.assert_close(vectors.users_Ud, mean(layers)[0], rtol=1e-6, atol=1e-6)
    nobody = vectors.fold_in(torch.zeros(1, DIM), torch.zeros(1))
    assert nobody.isfinite().all()


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> DataFolder:
    made: DataFolder = planted_folder(tmp_path_factory.mktemp("planted") / "data", num_users=100)
    return made


def test_it_overfits_the_items_of_a_hundred_users(folder: DataFolder, tmp_path: Path) -> None:
    """The first item of every user's list is one of the training events, and nearly all of the first are."""
    training = {
        "epochs": 30,
        "microbatches": 2,
        "tokens": 256,
        "eval_every": 30,
        "optim": {"lr": 0.05, "weight_decay": 0.0},
    }
    tree = {"name": "lightgcn", "dim": 64, "layers": 1, "l2": 0.0, "negatives": 4}
    recommender = Recommender.load(planted_run(tmp_path / "run", folder, tree, training))
    scores = torch.from_numpy(recommender.user_vectors(folder.user_ids) @ recommender.item_vectors().T)
    pairs = TrainingPairs.read(folder)
    own = torch.zeros(scores.shape, dtype=torch.bool)
    own[pairs.user, pairs.item - 1] = True
    order = scores.argsort(dim=1, descending=True)
    assert own.gather(1, order[:, :1]).float().mean() >= 0.99
    precision = [own[u, order[u, :count]].float().mean() for u, count in enumerate(own.sum(1).tolist())]
    assert torch.stack(precision).mean() > 0.9


def test_two_workers_train_the_same_tables_as_one(folder: DataFolder, tmp_path: Path) -> None:
    tree, training = {"name": "lightgcn", "dim": 8, "layers": 2}, {"epochs": 2, "microbatches": 4}
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
