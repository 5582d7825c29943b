"""M3Rec: its definition, the gradients of content, and what shared layers and content are for."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from planted import planted_folder
from small_models import make_model
from trained_model import train_model

from findrec.datasets.batches.batch import Batch
from findrec.datasets.folder.features import ModalRows
from findrec.datasets.folder.in_memory import write_data_folder
from findrec.models.m3rec.config import LayersConfig, M3RecConfig

WIDTHS = {"text": 6, "image": 5}
MODEL: dict[str, Any] = {"name": "m3rec", "stream": {"layers": 1, "d_state": 8}}


def example() -> tuple[Batch, torch.Tensor, dict[str, ModalRows]]:
    torch.manual_seed(0)
    item = torch.randint(1, 20, (3, 7))
    batch = Batch.build(item, torch.full((3,), 7), torch.arange(3), torch.arange(21), item.flatten().roll(-1))
    features = {n: ModalRows(torch.randn(len(batch.ids), w), batch.ids > 0) for n, w in WIDTHS.items()}
    return batch, torch.randn(len(batch.ids), 8), features


@pytest.mark.parametrize("shared", [True, False])
def test_each_stream_is_encoded_by_itself_and_scored_with_its_weight(shared: bool) -> None:
    batch, rows, features = example()
    model = make_model(MODEL | {"dim": 8, "shared": shared}, WIDTHS).eval()
    assert len(model.layers) == (1 if shared else 3)
    model.weight.data = torch.tensor([0.5, -2.0])
    h = model(batch, rows, features).h.split(8, dim=1)
    inputs = [rows, *model.content.encode(features).values()]
    for s, vectors in enumerate(inputs):
        x = model.layers[0 if shared else s](vectors[batch.index] * 8**0.5).flatten(0, 1)
        fed = torch.nn.functional.gelu(model.feeds[s].feed_in(model.feeds[s].norm_in(x)))
        want = model.feeds[s].norm_out(x + model.feeds[s].feed_out(fed))
        torch.testing.assert_close(h[s], want * (1.0, 0.5, -2.0)[s], rtol=1e-4, atol=1e-5)
    scores = model(batch, rows, features).h @ model.item_transform(rows, features).T
    want_scores = sum(part @ vectors.T for part, vectors in zip(h, inputs, strict=True))
    torch.testing.assert_close(scores, want_scores)


def test_content_is_trained_through_the_sequence() -> None:
    """In the public code the layers run without gradients for content: only its scores train it."""
    batch, rows, features = example()
    model = make_model(MODEL | {"dim": 8}, WIDTHS).train()
    (model(batch, rows, features).h[:, 8:] * torch.randn(21, 16)).sum().backward()
    for project in model.content.projections.values():
        assert project.weight.grad.abs().sum() > 0
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in model.layers.parameters())


def test_content_tells_what_follows_where_ids_are_rare(tmp_path: Path) -> None:
    """The group of the next item follows from that of the last; the item in it is any."""
    rng = np.random.default_rng(0)
    groups, each = 8, 25
    follows = rng.permutation(groups)
    histories = []
    for _ in range(80):
        chain = [int(rng.integers(groups))]
        while len(chain) < 10:
            chain.append(int(follows[chain[-1]]))
        histories.append(np.array(chain) * each + rng.integers(each, size=len(chain)) + 1)
    text = np.repeat(rng.normal(size=(groups, 12)), each, axis=0) + 0.2 * rng.normal(size=(groups * each, 12))
    folder = write_data_folder(tmp_path / "data", histories, features={"text": text}, num_items=groups * each)
    content, ids = (
        train_model(folder, tmp_path / name, MODEL | {"modalities": modalities}, epochs=10)
        for name, modalities in (("content", "all"), ("ids", []))
    )
    assert content.hits(each) > 0.9  # the group is known
    assert ids.hits(each) < 0.6


def test_users_are_learned_by_heart(tmp_path: Path) -> None:
    folder = planted_folder(tmp_path / "data", num_users=100)
    assert train_model(folder, tmp_path / "run", MODEL, epochs=12).hits() > 0.95


def test_a_key_of_the_layers_leaves_the_others_at_their_published_values() -> None:
    layers = M3RecConfig(stream=LayersConfig(layers=1)).stream
    assert (layers.layers, layers.d_state) == (1, 32)


def test_wrong_configurations_are_explained() -> None:
    with pytest.raises(ValueError, match="the layers are kind=mamba"):
        make_model({"name": "m3rec", "stream": {"kind": "gru"}})
