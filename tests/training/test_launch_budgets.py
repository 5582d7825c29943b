"""What a training step asks of a GPU: kernels and waits, counted on an emulated one (emulated_card.py).

A bound that fails names the lines that count most. Lower a bound whenever a change allows it.
"""

from typing import Any

import pytest
import torch
from emulated_card import NAME
from work_on_card import (
    exact_loss,
    features,
    lists_of_items_there,
    ranking,
    routing,
    sampled_loss,
    train_step,
    training,
)

_OLD: dict[str, Any] = {"name": "findrec-2025", "routing": {"heads": 2}}
MODELS: dict[str, dict[str, Any]] = {
    "findrec": {},
    "2025": _OLD,
    "2025 content": _OLD | {"items": {"features": "both", "id_dropout": 0.2}},
}
SCAN = ("ops/scan", "models/parts/mamba.py")  # have kernels of their own on a GPU


@pytest.mark.parametrize(
    ("kind", "waits", "kernels", "updates"),
    # The sampled losses ask the GPU which ids are distinct.
    [("exact", 0, 347, 3), ("sampled", 1, 399, 5), ("gbce", 1, 379, 5)],
)
def test_a_step_of_findrec_stays_within_its_budget(card, kind, waits, kernels, updates):
    step = card(train_step, NAME, kind, places=True)
    assert step.microbatch.num_waits <= waits, step.microbatch.table()
    assert step.microbatch.num_kernels(*SCAN) <= kernels, step.microbatch.table()
    assert step.update.num_waits <= updates, step.update.table()
    assert step.update.num_kernels() <= 30, step.update.table()


@pytest.mark.parametrize("kind", ["exact", "sampled", "gbce"])
@pytest.mark.parametrize("model", MODELS)
def test_a_step_on_a_gpu_is_that_on_a_cpu(card, kind, model):
    """The code paths of a GPU compute the same; the generator of the emulated one is that of the CPU."""
    want = train_step("cpu", kind, **MODELS[model])
    for kept in (True, False):  # features
        step = card(train_step, NAME, kind, kept=kept, **MODELS[model])
        assert step.values.keys() == want.values.keys()
        assert step.values == pytest.approx(want.values, rel=1e-4, abs=1e-5)
        torch.testing.assert_close(step.weight, want.weight, rtol=1e-3, atol=1e-4)


def test_a_training_on_a_gpu_is_that_on_a_cpu(card, tmp_path):
    """With features read ahead by the loader's thread, validation and checkpoints."""
    want = training("cpu", tmp_path / "cpu")
    found = card(training, NAME, tmp_path / "card")
    assert len(found) == len(want) > 4
    for there, here in zip(found, want, strict=True):
        same = [key for key in here if key.startswith(("train/loss", "train/epoch_loss", "aux/", "step"))]
        assert {k: there[k] for k in same} == pytest.approx({k: here[k] for k in same}, rel=1e-3, abs=1e-4)
        assert there.keys() == here.keys()


def test_features_that_do_not_fit_a_gpu_are_read_ahead(card):
    """On a stream of their own: the microbatch neither waits for them nor copies them itself."""
    kept, read = (card(train_step, NAME, "exact", kept=kept) for kept in (True, False))
    assert read.microbatch.num_waits == 0, read.microbatch.table()
    copies = [
        sum(count for place, count in step.microbatch.kernels.items() if place.startswith("devices.py"))
        for step in (kept, read)
    ]
    assert copies[0] == copies[1] > 0, "only the events are copied, in either case"


def test_features_are_looked_up_on_a_gpu_where_they_fit(card):
    refused, kept, rows, counts = card(features, NAME)
    assert not refused
    assert kept
    assert counts.num_waits == 0, counts.table()
    wanted = features("cpu")[2]
    for found, want in zip(rows, wanted, strict=True):
        assert torch.equal(found, want)


def test_losses_take_few_tiles_of_a_gpu(card):
    counts = card(sampled_loss)
    assert counts.num_waits == 0, counts.table()
    assert counts.num_kernels() <= 90, counts.table()
    counts = card(exact_loss, 5000)
    assert counts.num_waits == 0, counts.table()
    assert counts.num_kernels() <= 40, counts.table()


def test_routing_takes_one_chunk_of_a_gpu(card):
    counts = card(routing)
    assert counts.num_waits == 0, counts.table()
    assert counts.num_kernels() <= 30, counts.table()


def test_ranking_takes_few_tiles_of_a_gpu(card):
    ranks, lists = card(ranking)
    assert ranks.num_kernels() <= 150, ranks.table()
    assert ranks.num_waits <= 15, ranks.table()
    assert lists.num_kernels() <= 10, lists.table()
    assert lists.num_waits <= 2, lists.table()


def test_lists_are_made_where_the_items_are(card):
    no_index, ids = card(lists_of_items_there)
    assert no_index
    assert ids.tolist() == [[2, 3, 1], [4, 3, 1]]
