"""What is particular to Mamba4Rec: its sizes, its keys, and memorising histories."""

from __future__ import annotations

import pytest
from memorise import hit_rate_of_memorised
from small_models import make_model

from findrec.config import parse_config
from findrec.errors import FindRecError
from findrec.models.mamba4rec.config import Mamba4RecConfig


def test_sizes_are_the_published_ones_and_stay_when_others_change() -> None:
    for overrides in ([], ["model.stream.expand=1"]):
        config = parse_config({"model": {"name": "mamba4rec"}}, overrides).model
        assert isinstance(config, Mamba4RecConfig)
        assert (config.dim, config.stream.layers, config.stream.d_state, config.stream.d_conv) == (
            64,
            1,
            32,
            4,
        )
    (layer,) = make_model({"name": "mamba4rec"}).stream.layers
    assert layer.mamba.conv_taps.shape == (128, 4)
    assert layer.mamba.A_log.shape == (128, 32)
    assert layer.feed_in.weight.shape == (256, 64)


def test_other_kinds_of_streams_are_refused() -> None:
    with pytest.raises(FindRecError, match=r"stream\.kind"):
        parse_config({"model": {"name": "mamba4rec"}}, ["model.stream.kind=gru"])


def test_only_several_layers_have_residuals_around_their_blocks() -> None:
    for layers in (1, 2):
        stream = make_model({"name": "mamba4rec", "dim": 8, "stream": {"layers": layers}}).stream
        assert [layer.residual for layer in stream.layers] == [layers > 1] * layers


def test_it_memorises_histories() -> None:
    assert hit_rate_of_memorised({"name": "mamba4rec", "dim": 32}) > 0.95
