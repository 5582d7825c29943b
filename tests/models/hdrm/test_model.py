"""HDRM: its loss against the equations in float64, its two stages, and what it learns."""

from __future__ import annotations

import copy
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import pytest
import torch
from planted import Silent, planted_folder
from safetensors.torch import save_file
from small_models import few_pairs
from torch import Tensor

from findrec.config import RunConfig, dump_config, parse_config
from findrec.datasets.batches.edges import Edges
from findrec.datasets.batches.training_pairs import TrainingPairs
from findrec.datasets.folder.data_folder import DataFolder
from findrec.evaluation.protocol import RankingProtocol
from findrec.evaluation.ranking.evaluate import rank_split
from findrec.evaluation.scoring.load import load_ranker
from findrec.evaluation.validation import validate
from findrec.models.base import DataFacts, Microbatch
from findrec.models.configs import choose_model
from findrec.models.hdrm import model as hdrm
from findrec.models.hdrm.model import HDRM
from findrec.serving.recommender import Recommender
from findrec.tables.base import ITEMS, USERS
from findrec.training.build import build_tables, build_tower_model
from findrec.training.checkpoints.saved_table import file_stem
from findrec.training.checkpoints.validations import find_artifacts
from findrec.training.loop import run_training
from findrec.training.runs import open_run_folder, read_run_config, training_jobs
from findrec.training.tower import PlainTower
from findrec.training.worker import Worker

NUM_USERS, NUM_ITEMS, DIM, LAYERS = 5, 14, 8, 2


def stage_rows() -> dict[str, Tensor]:
    """Rows of both tables, as the first stage leaves them; padding is zero."""
    generator = torch.Generator().manual_seed(0)
    users, items = (
        0.3 * torch.randn(count + 1, DIM - 1, generator=generator) for count in (NUM_USERS, NUM_ITEMS)
    )
    users[0], items[0] = 0, 0
    return {USERS: users, ITEMS: items}


def model(**keys: Any) -> HDRM:
    tree = {"name": "hdrm", "dim": DIM, "encoder": {"layers": LAYERS}, **keys}
    with TemporaryDirectory() as folder:
        for name, rows in stage_rows().items():
            save_file({"weight": rows}, f"{folder}/{file_stem(name)}-0-{len(rows) - 1}.safetensors")
        facts = DataFacts(
            NUM_ITEMS,
            NUM_USERS,
            artifacts={"encoder": Path(folder)},
            training_pairs=lambda: few_pairs(NUM_USERS, NUM_ITEMS),
        )
        torch.manual_seed(0)
        return HDRM(choose_model(tree), facts)  # type: ignore[arg-type]


def dense() -> tuple[Tensor, Tensor, Tensor]:
    """The edges `[U, V]`, and the tangent vectors of users and items by dense matrices, float64."""
    pairs = few_pairs(NUM_USERS, NUM_ITEMS)
    edges = torch.zeros(NUM_USERS + 1, NUM_ITEMS + 1, dtype=torch.float64)
    edges[pairs.user + 1, pairs.item] = 1
    adjacency = torch.eye(sum(edges.shape), dtype=torch.float64)
    adjacency[: NUM_USERS + 1, NUM_USERS + 1 :] = edges
    adjacency[NUM_USERS + 1 :, : NUM_USERS + 1] = edges.T
    adjacency /= adjacency.sum(1, keepdim=True)
    rows = stage_rows()
    layer = torch.cat([rows[USERS], rows[ITEMS]]).double()
    total = torch.zeros_like(layer)
    for _ in range(LAYERS):
        layer = adjacency @ layer
        total = total + layer
    return edges, total[: NUM_USERS + 1], total[NUM_USERS + 1 :]


def squared_distance(u: Tensor, v: Tensor) -> Tensor:
    """Between the points of tangent vectors, by the textbook."""

    def point(v: Tensor, sign: int) -> Tensor:
        radius = v.norm(dim=-1, keepdim=True)
        return torch.cat([radius.cosh(), sign * radius.sinh() * v / radius], dim=-1)

    return torch.arccosh((point(u, 1) * point(v, -1)).sum(-1)).square()


def edges_of_users() -> Edges:
    pairs = few_pairs(NUM_USERS, NUM_ITEMS)
    negative = torch.randint(
        1, NUM_ITEMS + 1, (len(pairs.user), 2), generator=torch.Generator().manual_seed(5)
    )
    return Edges(torch.from_numpy(pairs.user + 1), torch.from_numpy(pairs.item), negative)


@pytest.mark.parametrize("noise", ["directed", "isotropic"])
def test_the_loss_and_its_gradients_are_those_of_the_equations(noise: str) -> None:
    diffusion = {"noise": noise, "drop_condition": 0.4, "hidden": 16}
    ours = model(diffusion=diffusion, mix=0.4, margin=0.2, reconstruction=0.25, negatives=2)
    edges, count = edges_of_users(), 20
    microbatch = Microbatch(edges, None, num_targets=count, num_microbatches=2, seed=0)  # type: ignore[arg-type]
    torch.manual_seed(3)
    found = ours.loss(microbatch, {})  # type: ignore[arg-type]
    found.total.backward()  # type: ignore[no-untyped-call]

    torch.manual_seed(3)  # the same draws
    step = torch.randint(1, 51, edges.user.shape)
    normal, kept = torch.randn(len(edges.user), DIM - 1), torch.rand(len(edges.user)) >= 0.4
    assert 0 < kept.sum() < len(kept)
    matrix, users, items = dense()
    scale = users[1:].square().mean(0).sqrt()
    x = (users / scale)[edges.user]
    torch.testing.assert_close(
        ours.diffusion.mean_d.double(), (users / scale)[1:].mean(0), rtol=1e-4, atol=1e-6
    )
    others = matrix[edges.user]
    others[torch.arange(len(x)), edges.item] = 0
    history = (others @ items) / others.sum(1, keepdim=True) / scale
    noised = ours.diffusion.noised(x.float(), step, normal).double()
    twin = copy.deepcopy(ours.denoiser).double()
    twin.zero_grad()
    estimate = twin(noised, step, history, kept)
    angle = step.double() / 50 * torch.tensor(0.01).double().sqrt().arccos()
    weight = ((angle.cos() + 0.1 * (step.double() / 50).tanh()) / angle.sin()).square().clamp(max=5) / 5
    error = (weight * (estimate - x).square().mean(1)).sum() / count
    mixed = 0.6 * users[edges.user] + 0.4 * scale * estimate
    near, far = (
        squared_distance(mixed, items[edges.item]),
        squared_distance(mixed[:, None], items[edges.negative]),
    )
    hinge = (near[:, None] - far + 0.2).clamp(min=0)
    assert 0 < (hinge > 0).sum() < hinge.numel()
    ranking = hinge.mean(1).sum() / count
    want = 0.75 * ranking + 0.25 * error
    want.backward()  # type: ignore[no-untyped-call]
    torch.testing.assert_close(found.total.detach().double(), want.detach(), rtol=1e-4, atol=0)
    torch.testing.assert_close(found.aux["ranking"].double(), ranking.detach(), rtol=1e-4, atol=0)
    torch.testing.assert_close(found.aux["reconstruction"].double(), error.detach(), rtol=1e-4, atol=0)
    for (name, p), q in zip(ours.denoiser.named_parameters(), twin.parameters(), strict=True):
        assert p.grad is not None, name
        assert q.grad is not None, name
        torch.testing.assert_close(p.grad.double(), q.grad, rtol=1e-3, atol=1e-6)


def test_vectors_of_users_are_samples_that_depend_on_no_other_user(monkeypatch: pytest.MonkeyPatch) -> None:
    ours = model(mix=0.5).eval()
    with torch.no_grad():
        torch.manual_seed(1)
        found = ours.user_item_vectors({}, None)  # type: ignore[arg-type]
        monkeypatch.setattr(hdrm, "_SAMPLED_ROWS", 2)
        torch.manual_seed(2)
        again = ours.user_item_vectors({}, None)  # type: ignore[arg-type]
    torch.testing.assert_close(again.users_Ud, found.users_Ud)
    assert found.known_U.tolist() == [False] + [True] * NUM_USERS
    matrix, users, items = dense()
    guess = (matrix @ items / matrix.sum(1, keepdim=True).clamp(min=1) / ours.scale_d).float()
    normal = torch.randn(users.shape, generator=torch.Generator().manual_seed(0))

    def denoise(x: Tensor, step: Tensor) -> Tensor:
        return ours.denoiser(x, step, guess, torch.ones(len(x), dtype=torch.bool))  # type: ignore[no-any-return]

    with torch.no_grad():
        sampled = ours.diffusion.sample(guess, normal, denoise)
    mixed = 0.5 * users + 0.5 * (ours.scale_d * sampled).double()
    radius = mixed.norm(dim=1, keepdim=True)
    points = torch.cat([radius.cosh(), radius.sinh() * mixed / radius], dim=1)
    torch.testing.assert_close(found.users_Ud[1:].double(), points[1:], rtol=1e-4, atol=1e-5)


def test_guidance_moves_estimates_away_from_those_without_a_history() -> None:
    plain, guided = (model(mix=0.5, diffusion={"guidance": g}).eval() for g in (0.0, 2.0))
    x, step = torch.randn(4, DIM - 1), torch.full((4,), 3)
    history, has = torch.randn(4, DIM - 1), torch.ones(4, dtype=torch.bool)
    with_history = plain._guided(history, has)(x, step)
    without = plain.denoiser(x, step, history, ~has)
    found = guided._guided(history, has)(x, step)
    torch.testing.assert_close(found, with_history + 2 * (with_history - without))


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> DataFolder:
    made: DataFolder = planted_folder(tmp_path_factory.mktemp("planted") / "data", num_users=60)
    return made


@pytest.fixture(scope="module")
def config(folder: DataFolder, tmp_path_factory: pytest.TempPathFactory) -> RunConfig:
    encoder = {"layers": 1, "negatives": 4, "margin": 1.0, "epochs": 20, "lr": 0.05}
    tree = {
        "name": "trained",
        "runs": str(tmp_path_factory.mktemp("runs")),
        "data": {"folder": str(folder.path), "max_length": 16},
        "model": {"name": "hdrm", "dim": 33, "encoder": encoder, "mix": 0.5, "margin": 1.0, "negatives": 4}
        | {"reconstruction": 0.1},
        "training": {
            "epochs": 16,
            "eval_every": 100,  # only at the end
            "microbatches": 2,
            "tokens": 64,
            "optim": {"lr": 0.01, "weight_decay": 0.0},
        },
        "evaluation": {"baselines": [], "users_per_block": 64},
        "tracking": {"enabled": False},
    }
    return parse_config(tree)


@pytest.fixture(scope="module")
def run(config: RunConfig, folder: DataFolder) -> Path:
    """Both stages, trained one after the other."""
    path = open_run_folder(config)
    for job in training_jobs(config, path):
        torch.manual_seed(0)
        built = build_tower_model(job.config, folder, find_artifacts(job.config, job.needs))
        tower = PlainTower(built, job.config.training.optim)
        tables = build_tables(job.config, folder)
        assert list(tables) == ([] if job.needs else [ITEMS, USERS])
        run_training(
            job.config,
            folder,
            job.folder / "checkpoints",
            tower,
            tables,
            worker=Worker(),
            validate=validate,
            log=Silent(),
        )
    return path


def test_the_first_stage_has_its_own_keys_and_is_ranked_too(config: RunConfig) -> None:
    first, second = training_jobs(config, Path("run"))
    assert (first.name, second.name) == ("hdrm/encoder", "hdrm")
    assert first.ranked
    assert (first.config.training.epochs, first.config.training.optim.lr) == (20, 0.05)
    assert first.config.training.optim.weight_decay == second.config.training.optim.weight_decay == 0
    stage = parse_config(first.config.model_dump(mode="json")).model  # as it is read from its run folder
    assert stage.model_dump() == first.config.model.model_dump()
    assert stage.implementation == first.config.model.implementation
    assert (stage.dim, stage.margin, stage.layers) == (33, 1.0, 1)  # type: ignore[attr-defined]


def test_it_learns_which_items_a_user_has(folder: DataFolder, run: Path) -> None:
    recommender = Recommender.load(run)
    users, items = recommender.user_vectors(folder.user_ids), recommender.item_vectors()
    scores, pairs = torch.from_numpy(users @ items.T), TrainingPairs.read(folder)
    own = torch.zeros(scores.shape, dtype=torch.bool)
    own[pairs.user, pairs.item - 1] = True
    assert own.gather(1, scores.argmax(1)[:, None]).float().mean() > 0.97
    mean_rank = torch.stack([s[o].mean() - s[~o].mean() for s, o in zip(scores, own, strict=True)])
    assert (mean_rank > 0).all()


def test_without_the_mix_it_ranks_as_its_encoder(folder: DataFolder, run: Path) -> None:
    config = read_run_config(run)
    first, second = training_jobs(config, run)
    protocol = RankingProtocol.of(config, folder)
    alone = second.config.model.model_copy(update={"mix": 0.0})
    unmixed = type(second)(
        second.name, second.config.model_copy(update={"model": alone}), second.folder, second.needs
    )
    ranks = [
        rank_split(load_ranker(job, folder), folder, "valid", protocol) for job in (first, unmixed, second)
    ]
    assert np.array_equal(ranks[0].greater, ranks[1].greater)
    assert not np.array_equal(ranks[0].greater, ranks[2].greater)


def test_visitors_with_the_items_of_a_user_get_nearly_its_list(folder: DataFolder, run: Path) -> None:
    recommender, pairs = Recommender.load(run), TrainingPairs.read(folder)
    histories = [
        [recommender.item_ids[i - 1] for i in pairs.item[pairs.offset[u] : pairs.offset[u + 1]]]
        for u in range(20)
    ]
    known = recommender.recommend(folder.user_ids[:20], k=5, exclude_seen=False)
    visitors = recommender.recommend(histories=histories, k=5, exclude_seen=False)
    common = [len(set(a.items) & set(b.items)) for a, b in zip(known, visitors, strict=True)]
    assert np.mean(common) > 3


def test_a_run_is_written_as_it_is_read(config: RunConfig, run: Path) -> None:
    assert dump_config(read_run_config(run)) == dump_config(config)
