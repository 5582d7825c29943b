"""The estimate of a microbatch's memory against the measured growth of a process that trains one."""

import gc

import pytest
import torch

from findrec.bench.memory import peak_bytes
from findrec.cluster.activations import MicrobatchShape, activation_bytes, loss_bytes, own_items_bytes
from findrec.config import parse_config
from findrec.datasets.batch import Batch, ModalRows
from findrec.models.registry import build_model
from findrec.tables.item_table import ItemTable
from findrec.tables.parts import TableSpec
from findrec.training.objectives import microbatch_loss
from findrec.training.tower import PlainTower

NUM_ITEMS = 3000
SHAPES = {"short": (64, 50), "long": (3, 1500)}
SAMPLED = {"loss": {"kind": "sampled"}}
MODELS = {
    "findrec": ({"model": {"dim": 64}}, {"text": 48, "image": 96}),
    "sasrec": ({"model": {"name": "sasrec", "dim": 64, "layers": 3}}, {}),
    "gru": ({"model": {"dim": 48, "repeat": False, "stream": {"kind": "gru", "layers": 3}}}, {}),
    "sampled": (
        {"model": {"dim": 32, "stream": {"kind": "transformer"}}, "training": SAMPLED},
        {"text": 384},
    ),
    "content": ({"model": {"dim": 32, "items": {"features": "both"}}}, {"text": 384}),
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
    return Batch.build(item, full, torch.arange(rows), position, item.flatten().roll(-1))


def shape_of(batch):
    rows, length = batch.item.shape
    return MicrobatchShape(rows, length, len(batch.target), len(batch.ids))


def one_microbatch(model, shape):
    """The training of one microbatch, after a small one that loads and builds what is needed once."""
    torch.manual_seed(0)
    torch.set_num_threads(1)
    tree, dims = MODELS[model]
    config = parse_config(tree | {"data": {"max_length": 2000}})
    network = build_model(
        config.model, feature_dims=dims, repeat=config.model.repeat, max_length=config.data.max_length
    )
    tower = PlainTower(network, config.training.optim)
    table = ItemTable(
        TableSpec(
            NUM_ITEMS,
            config.model.dim,
            seed=0,
            loss=config.training.loss,
            optim=config.training.optim,
            train_count=torch.ones(NUM_ITEMS + 1),
        )
    )
    catalogue = Features(dims)

    def run(rows, length):
        batch = make_batch(rows, length)
        microbatch_loss(
            tower, table, batch, catalogue, num_targets=len(batch.target), num_microbatches=1, seed=0
        )
        gc.collect()

    run(2, 8)
    return lambda: run(*SHAPES[shape])


def estimate(model, shape):
    tree, dims = MODELS[model]
    config = parse_config(tree)
    torch.manual_seed(0)
    found = shape_of(make_batch(*SHAPES[shape]))
    return (
        activation_bytes(config, dims, found)
        + own_items_bytes(config, found)
        + loss_bytes(config, dims, found, NUM_ITEMS + 1)
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
