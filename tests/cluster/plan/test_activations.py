"""The estimate of a microbatch's memory against the measured growth of a process that trains one."""

import gc
from typing import Any

import pytest
import torch
from bench.memory import peak_bytes
from small_models import make_model, row_width

from findrec.cluster.plan.activations import (
    MicrobatchShape,
    loss_bytes,
    measure_microbatch,
    repeat_bonus_bytes,
)
from findrec.config import parse_config
from findrec.datasets.batches.batch import Batch
from findrec.datasets.folder.features import ModalRows
from findrec.models.base import Microbatch, TableShape
from findrec.tables.base import ITEMS
from findrec.tables.item_table import ItemTable
from findrec.tables.table_spec import TableSpec
from findrec.training.objectives import run_microbatch
from findrec.training.tower import PlainTower

NUM_ITEMS = 3000
SHAPES = {"short": (64, 50), "long": (3, 1500)}
SAMPLED = {"loss": {"kind": "sampled"}}
MODELS: dict[str, Any] = {
    "findrec": ({"model": {"dim": 64}}, {"text": 48, "image": 96}),
    "sasrec": ({"model": {"name": "sasrec", "dim": 64, "layers": 3}}, {}),
    "gru": ({"model": {"dim": 48, "repeat": False, "stream": {"kind": "gru", "layers": 3}}}, {}),
    "sampled": (
        {"model": {"dim": 32, "stream": {"kind": "transformer"}}, "training": SAMPLED},
        {"text": 384},
    ),
    "bivrec": ({"model": {"name": "bivrec", "dim": 32}}, {"text": 48, "image": 96}),
    "hm4sr": ({"model": {"name": "hm4sr", "dim": 32}}, {"text": 48, "image": 96}),
    "2025": (
        {"model": {"name": "findrec-2025", "dim": 32, "items": {"features": "both"}}},
        {"text": 384},
    ),
    "gru4rec": ({"model": {"name": "gru4rec"}}, {}),
    "esasrec": ({"model": {"name": "esasrec"}, "training": SAMPLED}, {}),
    "hstu": ({"model": {"name": "hstu"}}, {}),
    "mamba4rec": ({"model": {"name": "mamba4rec"}}, {}),
    "unisrec": ({"model": {"name": "unisrec"}}, {"text": 384}),
    "unisrec sampled": ({"model": {"name": "unisrec"}, "training": SAMPLED}, {"text": 384}),
}


class Features:
    """Made-up features of every item."""

    def __init__(self, dims):
        self.tables = {name: torch.randn(NUM_ITEMS + 1, dim) for name, dim in dims.items()}

    def features(self, ids):
        return {name: ModalRows(t[ids], ids > 0) for name, t in self.tables.items()}

    def all_features(self, device, part=None):
        part = part or range(NUM_ITEMS + 1)
        return self.features(torch.arange(part.start, part.stop))


def make_batch(rows, length):
    item = torch.randint(1, NUM_ITEMS + 1, (rows, length))
    full = torch.full((rows,), length)
    position = torch.arange(rows * length)
    time = torch.arange(rows * length).view(rows, length)
    return Batch.build(item, full, torch.arange(rows), position, item.flatten().roll(-1), time=time)


def shape_of(batch):
    rows, length = batch.item.shape
    return MicrobatchShape(rows, length, len(batch.target), len(batch.ids))


def one_microbatch(model, shape):
    """The training of one microbatch, after a small one that loads and builds what is needed once."""
    torch.manual_seed(0)
    torch.set_num_threads(1)
    tree, dims = MODELS[model]
    config = parse_config(tree | {"data": {"max_length": 2000}})
    network = make_model(config.model, dims, max_length=config.data.max_length, num_items=NUM_ITEMS)
    tower = PlainTower(network, config.training.optim)
    table = ItemTable(
        TableSpec(
            NUM_ITEMS,
            row_width(config.model, dims),
            seed=0,
            loss=config.training.loss,
            optim=config.training.optim,
            train_count=torch.ones(NUM_ITEMS + 1),
        )
    )
    catalogue = Features(dims)

    def run(rows, length):
        batch = make_batch(rows, length)
        run_microbatch(tower, {ITEMS: table}, Microbatch(batch, catalogue, len(batch.target), 1, 0))
        gc.collect()

    run(2, 8)
    return lambda: run(*SHAPES[shape])


def estimate(model, shape):
    tree, dims = MODELS[model]
    config = parse_config(tree | {"data": {"max_length": 2000}})
    torch.manual_seed(0)
    network = make_model(config.model, dims, max_length=config.data.max_length, num_items=NUM_ITEMS).train()
    batch = make_batch(*SHAPES[shape])
    width = row_width(config.model, dims)
    shapes = {ITEMS: TableShape(NUM_ITEMS, width)}
    measured = measure_microbatch(network, shapes, Microbatch(batch, Features(dims), len(batch.target), 1, 0))
    return (
        measured
        + repeat_bonus_bytes(config, shape_of(batch))
        + loss_bytes(config, dims, shape_of(batch), NUM_ITEMS + 1, row_width=width)
    )


@pytest.mark.parametrize(
    ("model", "shape"),
    [
        ("findrec", "short"),
        ("findrec", "long"),
        *(pytest.param(m, s, marks=pytest.mark.slow) for m in MODELS if m != "findrec" for s in SHAPES),
    ],
)
def test_within_a_factor_of_two_of_the_measured_peak(model, shape):
    measured = peak_bytes(one_microbatch, model, shape)
    estimated = estimate(model, shape)
    print(f"{model} {shape}: {measured / 2**20:.0f} MiB measured, {estimated / 2**20:.0f} estimated")
    assert measured / 2 < estimated < measured * 2
