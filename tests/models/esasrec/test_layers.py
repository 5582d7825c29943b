"""The LiGR layer against its equations in plain float64."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from findrec.models.esasrec.layers import GatedLayer

DIM, LENGTH, FACTOR = 8, 11, 3


def make_layer(heads: int) -> GatedLayer:
    torch.manual_seed(0)
    layer = GatedLayer(DIM, heads, FACTOR, 0.0).double()
    for parameter in layer.parameters():  # norms start as the identity
        parameter.data += 0.3 * torch.randn_like(parameter)
    return layer


def normed(x: Tensor, norm: torch.nn.LayerNorm) -> Tensor:
    centred = x - x.mean()
    return centred / (centred.square().mean() + norm.eps).sqrt() * norm.weight + norm.bias


def plain_layer(layer: GatedLayer, x_Ld: Tensor) -> Tensor:
    """One history, one event and one head at a time."""
    width = DIM // layer.heads
    rows = []
    qkv_L3d = torch.stack([layer.qkv(normed(x, layer.norm_attention)) for x in x_Ld])
    q_Ld, k_Ld, v_Ld = qkv_L3d.split(DIM, dim=1)
    for step, x in enumerate(x_Ld):
        mixed = []
        for head in range(layer.heads):
            part = slice(head * width, (head + 1) * width)
            logits = torch.stack([q_Ld[step, part] @ k_Ld[j, part] for j in range(step + 1)])
            weights = (logits / math.sqrt(width)).softmax(0)
            mixed.append(sum(w * v_Ld[j, part] for j, w in enumerate(weights)))
        gate = 1 / (1 + torch.exp(-layer.gate_attention(x)))
        x = x + gate * layer.out(torch.cat(mixed))  # type: ignore[arg-type]
        switch, value = layer.feed_in(normed(x, layer.norm_feed)).split(FACTOR * DIM)
        gate = 1 / (1 + torch.exp(-layer.gate_feed(x)))
        rows.append(x + gate * layer.feed_out(switch / (1 + torch.exp(-switch)) * value))
    return torch.stack(rows)


@pytest.mark.parametrize("heads", [1, 2])
def test_the_layer_is_that_of_the_equations(heads: int) -> None:
    layer = make_layer(heads)
    x_BLd = torch.randn(3, LENGTH, DIM, dtype=torch.float64)
    for x_Ld, result_Ld in zip(x_BLd, layer(x_BLd), strict=True):
        torch.testing.assert_close(result_Ld, plain_layer(layer, x_Ld))


@pytest.mark.parametrize("branch", ["attention", "feed"])
def test_a_closed_gate_removes_its_branch(branch: str) -> None:
    layer = make_layer(2)
    x_BLd = torch.randn(2, LENGTH, DIM, dtype=torch.float64)
    gate = getattr(layer, f"gate_{branch}")
    gate.weight.data.zero_()
    gate.bias.data.fill_(-1e3)
    before = layer(x_BLd)
    for name, parameter in layer.named_parameters():
        if name.startswith(
            ("qkv", "out", "norm_attention") if branch == "attention" else ("feed", "norm_feed")
        ):
            parameter.data += torch.randn_like(parameter)
    torch.testing.assert_close(layer(x_BLd), before)
    gate.bias.data.zero_()
    assert not torch.allclose(layer(x_BLd), before)
