"""HGCF against its equations in float64, and what it learns."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from planted import planted_folder, planted_run
from small_models import few_pairs
from torch import Tensor

from findrec.config import LossConfig, OptimConfig
from findrec.datasets.batches.edges import Edges
from findrec.datasets.batches.training_pairs import TrainingPairs
from findrec.datasets.folder.data_folder import DataFolder
from findrec.evaluation.index.curve import measure_indexes
from findrec.evaluation.protocol import RankingProtocol
from findrec.evaluation.ranking.evaluate import rank_split
from findrec.evaluation.scoring.load import load_ranker
from findrec.models.base import DataFacts, Microbatch
from findrec.models.configs import choose_model
from findrec.models.hgcf.model import HGCF
from findrec.models.parts.hyperbolic_graph import fold_in, propagate, ranked_points
from findrec.models.parts.interaction_graph import InteractionGraph
from findrec.serving.recommender import Recommender
from findrec.tables.base import ITEMS, USERS
from findrec.tables.item_table import ItemTable
from findrec.tables.table_spec import TableSpec
from findrec.training.checkpoints.checkpoint import load_checkpoint
from findrec.training.checkpoints.validations import best_checkpoint_path
from findrec.training.objectives import run_microbatch
from findrec.training.runs import main_job, read_run_config
from findrec.training.tower import PlainTower

NUM_USERS, NUM_ITEMS, DIM, LAYERS = 5, 14, 8, 3


def dense_graph() -> Tensor:
    """`[U, V]` with padding, float64."""
    pairs = few_pairs(NUM_USERS, NUM_ITEMS)
    matrix = torch.zeros(NUM_USERS + 1, NUM_ITEMS + 1, dtype=torch.float64)
    matrix[pairs.user + 1, pairs.item] = 1
    return matrix


def dense_tangents(users: Tensor, items: Tensor) -> tuple[Tensor, Tensor, list[Tensor]]:
    """`sum_k (D^-1 (A + I))^k E` for k = 1..LAYERS, and the items of each layer."""
    edges = dense_graph()
    num_users = len(edges)
    adjacency = torch.eye(num_users + edges.shape[1], dtype=torch.float64)
    adjacency[:num_users, num_users:], adjacency[num_users:, :num_users] = edges, edges.T
    adjacency /= adjacency.sum(1, keepdim=True)
    layer = torch.cat([users, items])
    total, of_items = torch.zeros_like(layer), [items]
    for _ in range(LAYERS):
        layer = adjacency @ layer
        total = total + layer
        of_items.append(layer[num_users:])
    return total[:num_users], total[num_users:], of_items


def plain_squared_distance(u: Tensor, v: Tensor) -> Tensor:
    """Between the points of two tangent vectors, by arcosh of the textbook."""

    def point(v: Tensor) -> Tensor:
        radius = v.norm(dim=-1, keepdim=True)
        return torch.cat([-radius.cosh(), radius.sinh() * v / radius], dim=-1)

    x, y = point(u), point(v)
    return torch.arccosh(x[..., 0] * y[..., 0] - (x[..., 1:] * y[..., 1:]).sum(-1)).square()


def facts() -> DataFacts:
    return DataFacts(NUM_ITEMS, NUM_USERS, training_pairs=lambda: few_pairs(NUM_USERS, NUM_ITEMS))


def model(**keys: object) -> HGCF:
    config = choose_model({"name": "hgcf", "dim": DIM, "layers": LAYERS, "margin": 0.15, **keys})
    return HGCF(config, facts())  # type: ignore[arg-type]


def rows() -> tuple[Tensor, Tensor]:
    """Rows of both tables, float64, padding zero."""
    generator = torch.Generator().manual_seed(0)
    users, items = (
        0.3 * torch.randn(count + 1, DIM - 1, generator=generator, dtype=torch.float64)
        for count in (NUM_USERS, NUM_ITEMS)
    )
    users[0], items[0] = 0, 0
    return users, items


def test_the_graph_convolution_is_that_of_dense_matrices() -> None:
    users, items = rows()
    graph = InteractionGraph(few_pairs(NUM_USERS, NUM_ITEMS), NUM_USERS, NUM_ITEMS)
    layers = propagate(graph, users, items, LAYERS)
    want_users, want_items, _ = dense_tangents(users, items)
    torch.testing.assert_close(layers.user_tangents, want_users)
    torch.testing.assert_close(layers.item_tangents, want_items)


def test_the_loss_and_its_gradients_are_those_of_the_equations() -> None:
    """Two microbatches of one step: their sum is the mean over all edges."""
    optim = OptimConfig()
    tables = {
        name: ItemTable(TableSpec(count, DIM - 1, seed=0, loss=LossConfig(), optim=optim, name=name))
        for name, count in ((USERS, NUM_USERS), (ITEMS, NUM_ITEMS))
    }
    users, items = rows()
    for table, values in zip(tables.values(), (users, items), strict=True):
        table.weight.copy_(values)
    generator = torch.Generator().manual_seed(1)
    user = torch.randint(1, NUM_USERS + 1, (7,), generator=generator)
    item, *negative = torch.randint(1, NUM_ITEMS + 1, (3, 7), generator=generator)
    negatives = torch.stack(negative, dim=1)
    tower = PlainTower(model(negatives=2).train(), optim)
    found = torch.zeros(())
    for part in (slice(0, 4), slice(4, 7)):
        edges = Edges(user[part], item[part], negatives[part])
        microbatch = Microbatch(edges, None, num_targets=7, num_microbatches=2, seed=0)  # type: ignore[arg-type]
        found = found + run_microbatch(tower, tables, microbatch).loss

    users.requires_grad_()
    items.requires_grad_()
    all_users, all_items, _ = dense_tangents(users, items)
    near = plain_squared_distance(all_users[user], all_items[item])
    far = plain_squared_distance(all_users[user][:, None], all_items[negatives])
    hinge = (near[:, None] - far + 0.15).clamp(min=0)
    assert 0 < (hinge > 0).sum() < hinge.numel()
    want = hinge.mean()
    want.backward()  # type: ignore[no-untyped-call]
    torch.testing.assert_close(found.double(), want.detach(), rtol=1e-5, atol=0)
    for table, values in zip(tables.values(), (users, items), strict=True):
        assert values.grad is not None
        _, gradient = table._local.gradient()
        torch.testing.assert_close(gradient[1:].double(), values.grad[1:], rtol=1e-4, atol=1e-7)


def test_visitors_are_propagated_as_one_more_user_of_fixed_items() -> None:
    users, items = rows()
    graph = InteractionGraph(few_pairs(NUM_USERS, NUM_ITEMS), NUM_USERS, NUM_ITEMS)
    _, _, layers = dense_tangents(users, items)
    history = [2, 5, 7, 12]  # 12 has no training events
    vector = layers[0][history[:3]].mean(0)
    want = torch.zeros_like(vector)
    for layer in layers[:-1]:
        vector = (vector + layer[history[:3]].sum(0)) / 4
        want = want + vector
    folded = propagate(graph, users, items, LAYERS).folded_items(graph.item_degree)
    found = fold_in(torch.stack([folded[history].sum(0), folded[[12, 13]].sum(0)]), LAYERS)
    torch.testing.assert_close(found[0], want)
    assert not found[1].any()  # nothing is known: the origin


def test_items_without_training_events_come_last() -> None:
    users, items = rows()
    scored = ranked_points(items * 5, torch.tensor([0.0] + [2.0] * 10 + [0.0] * 4))
    signs = model().score_signs
    for user in ranked_points(torch.cat([users, -items * 9]), torch.ones(NUM_USERS + NUM_ITEMS + 2)):
        scores = scored @ (user * signs)
        assert scores[1:11].min() > scores[11]
        assert scores[11:].unique().numel() == 1


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> DataFolder:
    made: DataFolder = planted_folder(tmp_path_factory.mktemp("planted") / "data", num_users=60)
    return made


@pytest.fixture(scope="module")
def run(folder: DataFolder, tmp_path_factory: pytest.TempPathFactory) -> Path:
    tree = {"name": "hgcf", "dim": 33, "layers": 1, "negatives": 4, "margin": 1.0}
    training = {
        "epochs": 20,
        "microbatches": 2,
        "tokens": 64,
        "eval_every": 10,
        "optim": {"lr": 0.05, "weight_decay": 0.0},
    }
    path: Path = planted_run(tmp_path_factory.mktemp("runs") / "graph", folder, tree, training)
    return path


def test_it_learns_which_items_a_user_has(folder: DataFolder, run: Path) -> None:
    """The items of the training events of nearly every user are nearer than all others."""
    recommender = Recommender.load(run)
    users, items = recommender.user_vectors(folder.user_ids), recommender.item_vectors()
    scores = torch.from_numpy(users @ items.T)
    pairs = TrainingPairs.read(folder)
    own = torch.zeros(scores.shape, dtype=torch.bool)
    own[pairs.user, pairs.item - 1] = True
    first = scores.argmax(1)
    assert own.gather(1, first[:, None]).float().mean() > 0.97
    count = own.sum(1)
    order = scores.argsort(dim=1, descending=True)
    hits = torch.stack([own[u, order[u, : count[u]]].float().mean() for u in range(len(own))])
    assert hits.mean() > 0.9


def test_ranks_are_by_hyperbolic_distance(folder: DataFolder, run: Path) -> None:
    config = read_run_config(run)
    path = best_checkpoint_path(run / "checkpoints")
    assert path is not None
    saved = load_checkpoint(path)
    graph = InteractionGraph(TrainingPairs.read(folder), folder.num_users, folder.num_items)
    users, items = (saved.tables[name]["weight"].double() for name in (USERS, ITEMS))
    layers = propagate(graph, users, items, 1)
    ranks = rank_split(
        load_ranker(main_job(config, run), folder), folder, "valid", RankingProtocol.of(config, folder)
    )
    apart = plain_squared_distance(
        layers.user_tangents[1 + torch.from_numpy(ranks.user)][:, None], layers.item_tangents[None]
    )
    apart[:, graph.item_degree == 0] = torch.inf
    nearer = (apart < apart.gather(1, torch.from_numpy(ranks.target)[:, None])).sum(1).numpy()
    # Points are rounded to float32, so items at almost one distance may change places.
    assert np.abs(nearer - ranks.greater).max() <= 1
    assert (nearer == ranks.greater).mean() > 0.98


def test_an_exact_index_gives_the_same_lists(folder: DataFolder, run: Path) -> None:
    """The index holds points, and queries have the sign of the time-like coordinate changed."""
    measured = measure_indexes(run, ["Flat"], users=30, threads=1)
    assert {point.recall for point in measured.points} == {1.0}
    exact, indexed = (
        Recommender.load(run, index).recommend(folder.user_ids, k=5) for index in (None, "Flat")
    )
    assert [one.items for one in exact] == [one.items for one in indexed]


def test_visitors_with_the_items_of_a_user_get_nearly_its_list(folder: DataFolder, run: Path) -> None:
    recommender = Recommender.load(run)
    pairs = TrainingPairs.read(folder)
    users = folder.user_ids[:20]
    histories = [
        [recommender.item_ids[i - 1] for i in pairs.item[pairs.offset[u] : pairs.offset[u + 1]]]
        for u in range(20)
    ]
    known = recommender.recommend(users, k=5, exclude_seen=False)
    visitors = recommender.recommend(histories=histories, k=5, exclude_seen=False)
    common = [len(set(a.items) & set(b.items)) for a, b in zip(known, visitors, strict=True)]
    assert np.mean(common) > 3
