"""What is particular to GRU4Rec: its defaults, dropout of embeddings and states, and memorising histories."""

from __future__ import annotations

import torch
from memorise import hit_rate_of_memorised
from small_models import make_model

from findrec.models.gru4rec.config import GRU4RecConfig


def test_defaults_are_those_of_the_published_recipe() -> None:
    model = make_model({"name": "gru4rec"})
    (gru,) = model.stream.grus
    assert (gru.input_size, gru.hidden_size) == (128, 128)
    assert model.stream.project is None
    assert model.repeat_head is None


def test_wider_states_are_projected_to_the_width_of_the_table() -> None:
    model = make_model(GRU4RecConfig(dim=8, hidden=20, layers=3))
    assert [(gru.input_size, gru.hidden_size) for gru in model.stream.grus] == [(8, 20), (20, 20), (20, 20)]
    assert model.stream(torch.randn(2, 5, 8)).shape == (2, 5, 8)


def test_it_memorises_histories() -> None:
    assert hit_rate_of_memorised({"name": "gru4rec", "dim": 32}) > 0.95
