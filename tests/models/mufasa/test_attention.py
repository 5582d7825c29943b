"""Layers of the sequence model: single positions, short rows, ablations, rotary positions."""

from __future__ import annotations

import pytest
import torch

from findrec.models.mufasa.attention import Compression, SparseLayer, SparseSelfAttention
from findrec.models.mufasa.rotary import rotate
from findrec.ops.sparse_attention.sizes import SparseSizes

DIM = 16
SIZES = SparseSizes(block=4, stride=2, selected_block=4, selected=4, window=5, share=2)
BRANCHES = ("window", "block", "selected")
ABLATIONS = [(name,) for name in BRANCHES] + [BRANCHES[:2], BRANCHES[1:], BRANCHES[::2], BRANCHES]


def make(branches: tuple[str, ...] = BRANCHES) -> SparseLayer:
    torch.manual_seed(0)
    return SparseLayer(DIM, 4, 2, SIZES, branches, dropout=0.0).eval()


@pytest.mark.parametrize("branches", ABLATIONS, ids="+".join)
@pytest.mark.parametrize("length", [1, 3, 40])
def test_one_position_equals_all_positions(branches: tuple[str, ...], length: int) -> None:
    layer, x = make(branches), torch.randn(3, length, DIM)
    whole = layer(x)
    position = torch.tensor([[length - 1], [length // 2], [0]])
    assert whole.shape == x.shape
    assert torch.allclose(layer(x, position)[:, 0], whole[torch.arange(3), position[:, 0]], atol=1e-5)


@pytest.mark.parametrize("branches", ABLATIONS, ids="+".join)
def test_layers_are_causal_and_see_the_past(branches: tuple[str, ...]) -> None:
    layer, x = make(branches), torch.randn(1, 40, DIM)
    before = layer(x)
    for t in (0, 13, 39):
        moved = x.clone()
        moved[:, t] += 1.0
        changed = (layer(moved) - before).abs().amax((0, 2)) > 1e-6
        assert not changed[:t].any()
        assert changed[t]
    moved = x.clone()
    moved[:, 0] += 1.0
    far = (layer(moved) - before).abs().amax((0, 2))[SIZES.window :] > 1e-6
    assert far.any() == (branches != ("window",))


@pytest.mark.parametrize("branches", ABLATIONS, ids="+".join)
@pytest.mark.parametrize("length", [1, 30])
def test_every_weight_has_a_gradient_at_every_length(branches: tuple[str, ...], length: int) -> None:
    layer = make(branches)
    layer(torch.randn(2, length, DIM)).square().sum().backward()
    for name, parameter in layer.named_parameters():
        assert parameter.grad is not None, name
        if length > SIZES.block:
            assert parameter.grad.abs().sum() > 0, name


def test_gates_scale_the_branches_of_each_head() -> None:
    """With all gates closed nothing is read; an open one adds its branch."""
    torch.manual_seed(0)
    attention = SparseSelfAttention(DIM, 4, 2, SIZES, BRANCHES)
    x = torch.randn(1, 20, DIM)
    with torch.no_grad():
        attention.gate_out.weight.zero_()
        attention.gate_out.bias.fill_(-50)
        assert torch.allclose(attention(x), attention.out.bias.expand(1, 20, -1), atol=1e-6)
        attention.gate_out.bias[:4] = 50  # of the window
        alone = attention(x)
        assert not torch.allclose(alone, attention.out.bias.expand(1, 20, -1), atol=1e-3)
        moved = x.clone()
        moved[0, 0] += 1
        assert torch.allclose(attention(moved)[0, SIZES.window :], alone[0, SIZES.window :], atol=1e-6)


def test_compression_depends_on_the_order_within_a_block() -> None:
    torch.manual_seed(0)
    compress, block = Compression(4, 3), torch.randn(1, 2, 4, 2, 3)
    assert compress(block).shape == (1, 2, 2, 3)
    same = torch.ones_like(block) * block[:, :, :1]
    swapped = block[:, :, [1, 0, 2, 3]]
    assert not torch.allclose(compress(block), compress(swapped), atol=1e-3)
    assert torch.allclose(compress(same), compress(same[:, :, [1, 0, 2, 3]]))


def test_rotated_products_depend_on_the_distance_only() -> None:
    torch.manual_seed(0)
    q, k = torch.randn(1, 1, 1, 8), torch.randn(1, 1, 1, 8)

    def product(at: int, of: int) -> float:
        return float((rotate(q, torch.tensor([at])) * rotate(k, torch.tensor([of]))).sum())

    assert product(9, 4) == pytest.approx(product(105, 100), abs=1e-4)
    assert product(9, 4) != pytest.approx(product(9, 5), abs=1e-3)
    assert product(0, 0) == pytest.approx(float((q * k).sum()), abs=1e-6)
    assert torch.allclose(rotate(q, torch.tensor([7])).norm(), q.norm())
