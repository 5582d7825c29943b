"""What tests run on the emulated card (`emulated_card.py`) through the fixture `card`, in its own process."""

from __future__ import annotations

import atexit
import copy
import shutil
import tempfile
import warnings
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from emulated_card import NAME, Counting, Counts
from planted import make_config, planted_folder

from findrec.config import parse_config
from findrec.datasets.batches.catalogue import Catalogue
from findrec.datasets.batches.read_ahead import ReadAhead
from findrec.datasets.folder.data_folder import DataFolder
from findrec.evaluation.scoring.inner_product import InnerProductScorer
from findrec.evaluation.scoring.user_vectors import UserVectors, top_items
from findrec.evaluation.scoring.users import UserBlock
from findrec.evaluation.validation import validate
from findrec.models.base import Microbatch
from findrec.ops.expert_routing import expert_routing
from findrec.ops.losses.linear_cross_entropy import RepeatBonus, linear_cross_entropy
from findrec.ops.losses.sampled_cross_entropy import sampled_cross_entropy
from findrec.ops.ranking.target_rank import target_rank
from findrec.training.build import build_catalogue, build_tables, build_tower_model
from findrec.training.loop import run_training
from findrec.training.objectives import run_microbatch
from findrec.training.step_values import sum_over_workers
from findrec.training.tower import PlainTower
from findrec.training.worker import Worker


@dataclass(frozen=True)
class Step:
    """One microbatch and the update after it."""

    microbatch: Counts
    update: Counts
    values: dict[str, float]
    weight: torch.Tensor  # of the item table after the update


@cache
def _folder() -> DataFolder:
    root = tempfile.mkdtemp()
    atexit.register(shutil.rmtree, root)
    folder: DataFolder = planted_folder(Path(root) / "data", num_users=40)
    return folder


def train_step(device: str, kind: str, *, kept: bool = True, places: bool = False, **model: Any) -> Step:
    """Train a FindRec of two layers for two steps of one microbatch; returns the second.

    `kept`: the features are kept on the card; `places`: find the places of the backward pass, which is slow.
    """
    tree = {
        "data": {"max_length": 16},
        "model": {"dim": 32, "dropout": 0.0, "stream": {"layers": 2}} | model,
        "training": {"microbatches": 2, "tokens": 400, "loss": {"kind": kind, "negatives": 32}},
    }
    config = parse_config(tree)
    torch.manual_seed(0)
    folder = _folder()
    with Counting() as counting:
        network = build_tower_model(config, folder).to(device)
        tables = build_tables(config, folder, device)
        catalogue = build_catalogue(config, folder)
        if device == NAME and kept:
            catalogue.keep_on(device)
        source = type(network).examples(config, folder)
        examples = source.read(0, source.plan(0).steps[0])[0]
        tower = PlainTower(network, config.training.optim)
        network.train()
        for step in (1, 2):  # what is made once is made in the first
            network.start_step(step)
            ahead = ReadAhead(catalogue, device)(examples) if device == NAME else None
            counting.counts = Counts()
            with warnings.catch_warnings(), torch.autograd.set_detect_anomaly(places, check_nan=False):
                warnings.simplefilter("ignore")
                batch, features = ahead.to(device) if ahead else (examples, catalogue)
                microbatch = Microbatch(batch, features, num_targets=100, num_microbatches=2, seed=step)
                loss = run_microbatch(tower, tables, microbatch)
            first = copy.deepcopy(counting.counts)
            counting.counts = Counts()
            values = sum_over_workers({0: loss}, 2, Worker(device=torch.device(device))).values
            tower.step(0.01)
            for table in tables.values():
                table.step(0.01)
        return Step(first, copy.deepcopy(counting.counts), values, tables["items"].weight.cpu())


def training(device: str, checkpoints: Path) -> list[dict[str, float]]:
    """The logged values of a short training with validation and checkpoints."""
    values: list[dict[str, float]] = []
    log: Any = SimpleNamespace(log=lambda step, epoch, logged: values.append({"step": step} | dict(logged)))
    config = make_config(epochs=2, microbatches=2, tokens=300)
    torch.manual_seed(0)
    with Counting():
        run_training(
            config,
            _folder(),
            checkpoints,
            PlainTower(build_tower_model(config, _folder()).to(device), config.training.optim),
            build_tables(config, _folder(), device),
            worker=Worker(device=torch.device(device)),
            validate=validate,
            log=log,
        )
    return values


def features(device: str) -> tuple[bool, bool, list[torch.Tensor], Counts]:
    """Whether tables that fit and that do not are kept; rows looked up there, and their cost."""
    with Counting() as counting:
        catalogue = Catalogue(_folder(), ["text", "image"], noise=0.3, seed=1).altered(missing=0.2)
        refused, kept = catalogue.keep_on(device, share=1e-9), catalogue.keep_on(device)
        ids = torch.tensor([0, 7, 3, 60, 8]).to(device)
        counting.counts = Counts()
        rows = catalogue.features(ids)
        counts = copy.deepcopy(counting.counts)
        return refused, kept, [x.cpu() for r in rows.values() for x in (r.values, r.present)], counts


def lists_of_items_there() -> tuple[bool, torch.Tensor]:
    """The first three items of two users, whose items are on the card, without an index on the CPU."""
    with Counting():
        scorer = _PlainScorer()
        query: Any = SimpleNamespace(block=None, seen_BM=None, list_times=None)
        ids, _ = scorer.rank(query).top(3)
        return scorer._index is None, ids


class _PlainScorer(InnerProductScorer):
    def __init__(self) -> None:
        self.items_Vd = torch.tensor([[0.0, 0.0], [1.0, 5.0], [3.0, 4.0], [2.0, 6.0], [0.0, 7.0]]).to(NAME)

    def queries(self, block: UserBlock) -> UserVectors:
        return UserVectors(torch.eye(2).to(NAME))


def exact_loss(num_items: int, tokens: int = 3200) -> Counts:
    """The exact loss of a microbatch, forward and backward, with items that are no classes."""
    with Counting() as counting:
        h, table = (torch.randn(n, 16).to(NAME).requires_grad_() for n in (tokens, num_items + 1))
        target = torch.randint(1, num_items, (tokens,)).to(NAME)
        allowed = torch.ones(num_items + 1, dtype=torch.bool)
        allowed[num_items] = False
        allowed = allowed.to(NAME)
        for _ in range(2):
            counting.counts = Counts()
            linear_cross_entropy(h, table, target, allowed_V=allowed).backward()
        return counting.counts


def sampled_loss(tokens: int = 3200, users: int = 64, candidates: int = 40) -> Counts:
    """The sampled loss of a microbatch with repeat candidates, forward and backward."""
    with Counting() as counting:
        h, target_row = (torch.randn(tokens, 16).to(NAME).requires_grad_() for _ in range(2))
        rows = torch.randn(2048, 16).to(NAME).requires_grad_()
        candidate_rows = torch.randn(users, candidates, 16).to(NAME).requires_grad_()
        target, sample = (torch.randint(1, 5000, (n,)).to(NAME) for n in (tokens, 2048))
        repeat = RepeatBonus(
            torch.randint(1, 5000, (users, candidates)).to(NAME),
            (torch.arange(tokens) * users // tokens).to(NAME),
            (torch.rand(tokens, candidates) < 0.5).to(NAME),
            torch.randn(tokens, candidates).to(NAME).requires_grad_(),
            longest=200,
        )
        counting.counts = Counts()
        loss = sampled_cross_entropy(
            h, target_row, rows, target, sample, repeat=repeat, candidate_row_BNd=candidate_rows
        )
        loss.backward()
        return counting.counts


def routing(tokens: int = 3200) -> Counts:
    """Dense expert routing, forward only."""
    with Counting() as counting, torch.no_grad():
        x = torch.randn(tokens, 4, 32).to(NAME)
        logits, weight = torch.randn(tokens, 4, 4).to(NAME), torch.randn(4, 4, 32, 32).to(NAME)
        bias = torch.zeros(4, 4, 32).to(NAME)
        counting.counts = Counts()
        expert_routing(x, logits, weight, bias, impl="dense")
        return counting.counts


def ranking(num_items: int = 40_000, users: int = 256) -> tuple[Counts, Counts]:
    """Exact ranks of one block of users, and their lists of 20 items."""
    with Counting() as counting:
        vectors, items = torch.randn(users, 8).to(NAME), torch.randn(num_items + 1, 8).to(NAME)
        row, target = torch.arange(users).to(NAME), torch.randint(1, num_items, (users,)).to(NAME)
        counting.counts = Counts()
        target_rank(vectors, items, row, target)
        ranks = counting.counts
        counting.counts = Counts()
        top_items(UserVectors(vectors), items, 20)
        return ranks, counting.counts
