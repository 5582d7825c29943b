"""The layers of Mamba4Rec against the equations of the papers in plain float64, and one event at a time."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor, nn

from findrec.models.mamba4rec.config import LayersConfig
from findrec.models.mamba4rec.layers import Mamba4RecLayers, PostNormLayer
from findrec.models.parts.mamba import DT_MAX, DT_MIN, Mamba

DIM, LENGTH = 6, 11
Rows = list[Tensor]


def make_layers(layers: int) -> Mamba4RecLayers:
    torch.manual_seed(0)
    made = Mamba4RecLayers(DIM, 0.3, LayersConfig(layers=layers, d_state=3, d_conv=3)).double().eval()
    for parameter in made.parameters():  # norms start as the identity, biases at zero
        parameter.data += 0.2 * torch.randn_like(parameter)
    return made


def silu(x: Tensor) -> Tensor:
    return x / (1 + torch.exp(-x))


def normed(x: Tensor, norm: nn.LayerNorm) -> Tensor:
    centred = x - x.mean()
    return centred / (centred.square().mean() + norm.eps).sqrt() * norm.weight + norm.bias


def plain_mamba(block: Mamba, x_Ld: Rows) -> Rows:
    """The block of Gu & Dao 2023, one event and one channel at a time."""
    inner, taps = block.conv_taps.shape
    before, gate = zip(*((block.in_proj.weight @ x).split(inner) for x in x_Ld), strict=True)
    state_EN = torch.zeros(inner, block.num_states, dtype=torch.float64)
    outputs = []
    for step in range(len(x_Ld)):
        u = block.conv_bias.clone()
        for back in range(min(taps, step + 1)):
            u = u + block.conv_taps[:, taps - 1 - back] * before[step - back]
        u = silu(u)
        dt, b, c = (block.x_proj.weight @ u).split([block.dt_rank, block.num_states, block.num_states])
        delta = torch.log1p(torch.exp(block.dt_proj.weight @ dt + block.dt_proj.bias))
        y = block.D * u
        for e in range(inner):
            decay = torch.exp(-delta[e] * torch.exp(block.A_log[e]))
            state_EN[e] = decay * state_EN[e] + delta[e] * b * u[e]
            y = y + torch.eye(inner, dtype=torch.float64)[e] * (state_EN[e] @ c)
        outputs.append(block.out_proj.weight @ (y * silu(gate[step])))
    return outputs


def gelu(x: Tensor) -> Tensor:
    return x * (1 + torch.erf(x / math.sqrt(2))) / 2


def plain_layer(layer: PostNormLayer, x_Ld: Rows, residual: bool) -> Rows:
    outputs = []
    for x, mixed in zip(x_Ld, plain_mamba(layer.mamba, x_Ld), strict=True):
        y = normed(x + mixed if residual else mixed, layer.norm_mamba)
        fed = layer.feed_out(gelu(layer.feed_in(y)))
        outputs.append(normed(y + fed, layer.norm_feed))
    return outputs


@torch.no_grad()
@pytest.mark.parametrize("count", [1, 2])
def test_layers_are_those_of_the_equations(count: int) -> None:
    layers = make_layers(count)
    x_BLd = torch.randn(2, LENGTH, DIM, dtype=torch.float64)
    for x_Ld, result_Ld in zip(x_BLd, layers(x_BLd), strict=True):
        rows = [normed(x, layers.norm) for x in x_Ld]
        for layer in layers.layers:
            assert isinstance(layer, PostNormLayer)
            rows = plain_layer(layer, rows, residual=count > 1)
        torch.testing.assert_close(result_Ld, torch.stack(rows))


@torch.no_grad()
@pytest.mark.parametrize("split", [0, 1, 5])
def test_histories_can_be_continued_from_any_event_and_one_by_one(split: int) -> None:
    layers = make_layers(2)
    x_BLd = torch.randn(3, LENGTH, DIM, dtype=torch.float64)
    want = layers(x_BLd)
    _, states = layers.prefill(x_BLd[:, :split], torch.full((3,), split))
    later, _ = layers.prefill(x_BLd[:, split:], torch.full((3,), LENGTH - split), states)
    torch.testing.assert_close(later, want[:, split:])
    for step in range(split, LENGTH):
        y_Bd, states = layers.step(x_BLd[:, step], states)
        torch.testing.assert_close(y_Bd, want[:, step])


def test_blocks_keep_the_initialisation_of_their_time_steps() -> None:
    """Public code overwrites it with that of other linear layers: all steps are then softplus(0) = 0.69."""
    torch.manual_seed(0)
    for layer in Mamba4RecLayers(64, 0.0, LayersConfig(layers=2)).layers:
        assert isinstance(layer, PostNormLayer)
        delta_E = torch.nn.functional.softplus(layer.mamba.dt_proj.bias)
        assert delta_E.min() > 0.999 * DT_MIN
        assert delta_E.max() < 1.001 * DT_MAX
        assert delta_E.log().std() > 1
        assert layer.feed_in.weight.std().item() == pytest.approx(0.02, rel=0.05)
