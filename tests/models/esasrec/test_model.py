"""What is particular to eSASRec: its sizes, what it refuses, and memorising histories."""

from __future__ import annotations

import pytest
import torch
from memorise import hit_rate_of_memorised
from small_models import make_model

from findrec.config import load_config
from findrec.errors import FindRecError
from findrec.models.esasrec.config import ESASRecConfig


def test_the_file_has_the_published_loss() -> None:
    loss = load_config("esasrec").training.loss
    assert (loss.kind, loss.negatives, loss.popularity_power, loss.correct_sampling) == (
        "sampled",
        256,
        0,
        False,
    )


def test_the_factor_sets_the_width_of_the_position_wise_networks() -> None:
    model = make_model(ESASRecConfig(dim=8, feed_factor=3, layers=1))
    (layer,) = model.layers
    assert layer.feed_in.weight.shape == (2 * 3 * 8, 8)
    assert layer.feed_out.weight.shape == (8, 3 * 8)
    assert layer(torch.randn(2, 5, 8)).shape == (2, 5, 8)


def test_heads_must_divide_the_width() -> None:
    with pytest.raises(FindRecError, match=r"multiple of model\.heads=4"):
        make_model({"name": "esasrec", "dim": 10, "heads": 4})


def test_longer_histories_than_positions_are_refused() -> None:
    model = make_model({"name": "esasrec", "dim": 8}, max_length=6)
    assert model.longest_history == 6
    with pytest.raises(FindRecError, match=r"a history of 7 events .* 6 learned positions"):
        model.position(7)


def test_it_memorises_histories() -> None:
    assert hit_rate_of_memorised({"name": "esasrec", "dim": 32}) > 0.95
