"""Sparse attention: the oracle against loops, the fused branches and single positions against the oracle."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from bench.memory import peak_bytes
from bench.sparse_attention import make_run
from torch import Tensor
from torch.nn import functional as F

from findrec.ops.sparse_attention.attention import (
    Branch,
    Branches,
    Impl,
    cut_blocks,
    leader_positions,
    sparse_attention,
)
from findrec.ops.sparse_attention.importance import importance, select_blocks
from findrec.ops.sparse_attention.sizes import SparseSizes, sizes_for

TOLERANCE = {torch.float64: 1e-12, torch.float32: 1e-5}
SIZES = (
    SparseSizes(block=4, stride=2, selected_block=4, selected=4, window=5),
    SparseSizes(block=4, stride=2, selected_block=4, selected=4, window=40, share=4),
    SparseSizes(block=8, stride=4, selected_block=4, selected=5, window=7, share=2),
    SparseSizes(block=2, stride=2, selected_block=6, selected=2, window=1, share=3),
)


def draw(
    sizes: SparseSizes, length: int, *, rows: int = 2, dtype: torch.dtype = torch.float64, groups: int = 2
) -> Branches:
    """Random branches of four heads, whose block branch compresses keys and values by means."""
    torch.manual_seed(0)
    heads, width = 4, 3

    def number(*shape: int) -> Tensor:
        return torch.randn(*shape, dtype=dtype).requires_grad_()

    def branch(keys: int) -> Branch:
        gate = torch.rand(rows, length, heads, dtype=dtype).requires_grad_()
        shape = rows, keys, groups, width
        return Branch(number(rows, length, heads, width), number(*shape), number(*shape), gate)

    return Branches(branch(length), branch(sizes.num_blocks(length)), branch(length))


def given(branch: Branch | None) -> Branch:
    assert branch is not None
    return branch


def leaves(branches: Branches) -> list[Tensor]:
    return [x for b in branches.given().values() for x in (b.q, b.k, b.v, b.gate) if x is not None]


def compressed(x: Tensor, sizes: SparseSizes) -> Tensor:
    return cut_blocks(x, sizes).mean(2)


def at(branches: Branches, position: Tensor) -> Branches:
    """The branches with the queries and gates at positions `[B, P]`."""
    row = torch.arange(len(position))[:, None]
    return Branches(
        **{
            name: replace(b, q=b.q[row, position], gate=None if b.gate is None else b.gate[row, position])
            for name, b in branches.given().items()
        }
    )


@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize("length", [1, 3, 8, 21, 53])
@pytest.mark.parametrize("sizes", SIZES, ids=lambda s: f"share{s.share}")
def test_fused_and_its_gradients_equal_the_oracle(
    sizes: SparseSizes, length: int, dtype: torch.dtype
) -> None:
    branches = draw(sizes, length, dtype=dtype)
    impls: tuple[Impl, ...] = ("fused", "reference")
    results = []
    for impl in impls:
        out = sparse_attention(branches, sizes, impl=impl)
        torch.manual_seed(1)
        grads = torch.autograd.grad(out, leaves(branches), torch.randn_like(out), materialize_grads=True)
        results.append((out, *grads))
    for ours, exact in zip(*results, strict=True):
        if not ours.numel():  # keys of the block branch, before the first block has ended
            continue
        assert ours.dtype == dtype
        assert (ours - exact).abs().max() <= TOLERANCE[dtype] * max(1, float(exact.detach().abs().max()))


@pytest.mark.parametrize("impl", ["fused", "reference"])
def test_selecting_every_block_of_one_step_is_dense_attention(impl: Impl) -> None:
    """Blocks of one step, as many selected as there are, and the selective branch alone."""
    length = 30
    sizes = SparseSizes(block=1, stride=1, selected_block=1, selected=length, window=1)
    branches = draw(sizes, length)
    selected = replace(given(branches.selected), gate=torch.ones(2, length, 4, dtype=torch.float64))
    scorer = replace(given(branches.block), gate=None)
    ours = sparse_attention(Branches(block=scorer, selected=selected), sizes, impl=impl)
    k, v = (x.repeat_interleave(2, dim=2).transpose(1, 2) for x in (selected.k, selected.v))
    dense = F.scaled_dot_product_attention(selected.q.transpose(1, 2), k, v, is_causal=True)
    assert (ours - dense.transpose(1, 2)).abs().max() < 1e-12


def test_blocks_of_one_step_are_dense_attention_too() -> None:
    sizes = SparseSizes(block=1, stride=1, selected_block=1, selected=2, window=1)
    block = replace(given(draw(sizes, 30).block), gate=torch.ones(2, 30, 4, dtype=torch.float64))
    k, v = (x.repeat_interleave(2, dim=2).transpose(1, 2) for x in (block.k, block.v))
    dense = F.scaled_dot_product_attention(block.q.transpose(1, 2), k, v, is_causal=True)
    assert (sparse_attention(Branches(block=block), sizes) - dense.transpose(1, 2)).abs().max() < 1e-12


@pytest.mark.parametrize("sizes", SIZES, ids=lambda s: f"share{s.share}")
def test_a_step_sees_neither_the_future_nor_padding_nor_other_rows(sizes: SparseSizes) -> None:
    """Perturbing steps from t on, a longer sequence and other rows change nothing before t."""
    length = 60
    whole = draw(sizes, length)
    window, selected, scorer = given(whole.window), given(whole.selected), given(whole.block)

    def run(window: Branch, selected: Branch, scorer_q: Tensor) -> Tensor:
        """With blocks that are compressed from the steps of the window branch."""
        k, v = compressed(window.k, sizes), compressed(window.v, sizes)
        assert scorer.gate is not None
        block = Branch(scorer_q, k, v, scorer.gate[:, : scorer_q.shape[1]])
        return sparse_attention(Branches(window, block, selected), sizes)

    def moved(x: Tensor, t: int) -> Tensor:
        x = x.detach().clone()
        x[0, t:] += torch.randn_like(x[0, t:])
        x[1] = 9.0
        return x

    def cut(b: Branch, t: int) -> Branch:
        assert b.gate is not None
        return Branch(b.q[:, :t], b.k[:, :t], b.v[:, :t], b.gate[:, :t])

    before = run(window, selected, scorer.q)
    for t in (1, 17, 32, 59):
        torch.manual_seed(t)
        others = [replace(b, q=moved(b.q, t), k=moved(b.k, t), v=moved(b.v, t)) for b in (window, selected)]
        after = run(others[0], others[1], moved(scorer.q, t))
        assert torch.allclose(before[0, :t], after[0, :t], atol=1e-12)
        assert not torch.allclose(before[0, t:], after[0, t:], atol=1e-3)
        short = run(cut(window, t), cut(selected, t), scorer.q[:, :t])
        assert torch.allclose(before[:, :t], short, atol=1e-12)


@pytest.mark.parametrize("length", [1, 5, 24, 53])
@pytest.mark.parametrize("sizes", SIZES, ids=lambda s: f"share{s.share}")
def test_single_positions_equal_all_positions(sizes: SparseSizes, length: int) -> None:
    branches = draw(sizes, length)
    whole = sparse_attention(branches, sizes)
    position = torch.tensor([[length - 1, 0, length // 2], [length // 3, length - 1, length - 1]])
    row = torch.arange(2)[:, None]
    leader_q = given(branches.block).q[row, leader_positions(position, sizes)]
    some = sparse_attention(at(branches, position), sizes, position_BP=position, leader_q=leader_q)
    assert torch.allclose(some, whole[row, position], atol=1e-12)


@pytest.mark.parametrize("window", [1, 2, 31, 64, 101])
def test_the_window_alone_is_banded_attention(window: int) -> None:
    length = 150
    sizes = SparseSizes(block=4, stride=4, selected_block=4, selected=1, window=window)
    branch = replace(given(draw(sizes, length).window), gate=torch.ones(2, length, 4, dtype=torch.float64))
    step = torch.arange(length)
    band = (step[:, None] >= step) & (step[:, None] - step < window)
    k, v = (x.repeat_interleave(2, dim=2).transpose(1, 2) for x in (branch.k, branch.v))
    banded = F.scaled_dot_product_attention(branch.q.transpose(1, 2), k, v, attn_mask=band)
    assert torch.allclose(sparse_attention(Branches(branch), sizes), banded.transpose(1, 2), atol=1e-12)


@pytest.mark.parametrize("sizes", [*SIZES, sizes_for(4096)], ids=str)
def test_importance_counts_the_steps_that_blocks_share(sizes: SparseSizes) -> None:
    length = 5 * max(sizes.block, sizes.selected_block) + 3
    num_blocks, num_selectable = sizes.num_blocks(length), sizes.num_selectable(length)
    steps = torch.zeros(num_blocks, num_selectable)
    for i in range(num_blocks):
        for t in range(i * sizes.stride, i * sizes.stride + sizes.block):
            steps[i, t // sizes.selected_block] += 1
    q, k = torch.randn(1, 1, 4, 3), torch.randn(1, num_blocks, 2, 3)
    last = torch.tensor([[length - 1]])
    found = importance(q, k, last, num_selectable, sizes)[0, :, 0]
    for group in range(2):
        weights = (q[0, 0, 2 * group : 2 * group + 2] @ k[0, :, group].T * 3**-0.5).softmax(-1).sum(0)
        assert torch.allclose(found[group], weights @ (steps / sizes.stride), atol=1e-5)


def test_the_own_the_previous_and_the_first_block_are_always_selected() -> None:
    sizes = SparseSizes(block=2, stride=2, selected_block=2, selected=4, window=1)
    q = torch.zeros(1, 1, 1, 2)
    q[..., 0] = 5.0
    k = torch.zeros(1, 10, 1, 2)
    k[0, 6, 0, 0] = 5.0  # what the query looks for
    chosen, valid = select_blocks(q, k, torch.tensor([[19]]), 20, sizes)
    assert chosen.tolist() == [[[[9, 8, 0, 6]]]]
    assert valid.all()
    chosen, valid = select_blocks(q, k, torch.tensor([[3]]), 20, sizes)
    assert chosen[valid].tolist() == [1, 0]


def test_gradient_is_that_of_finite_differences() -> None:
    sizes = SIZES[1]
    branches = draw(sizes, 21, rows=1)

    def run(*tensors: Tensor) -> Tensor:
        return sparse_attention(Branches(*(Branch(*tensors[i : i + 4]) for i in range(0, 12, 4))), sizes)

    assert torch.autograd.gradcheck(run, leaves(branches), fast_mode=True)


@pytest.mark.slow
def test_memory_of_training_is_linear_in_the_length() -> None:
    """16,384 steps need about four times as much as 4,096, far less than a matrix of all pairs."""
    short, long = (peak_bytes(make_run, "sparse", (1, n, 2, 1, 16)) for n in (4096, 16_384))
    assert long < 6 * short
    assert long < 16_384**2  # bytes: one boolean mask


@pytest.mark.slow
def test_memory_of_the_last_position_is_that_of_its_keys() -> None:
    """Only the copies of the window, of the blocks' scores and of n selected blocks are made."""
    assert peak_bytes(make_run, "last", (1, 65_536, 4, 2, 32)) < 32 << 20


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"window": 0}, "window=0 must be at least 1"),
        ({"block": 3}, "block=3 must be a multiple of stride=2"),
        ({"share": 3}, "share=3 must divide selected_block=4"),
    ],
)
def test_wrong_sizes_are_told(change: dict[str, int], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        replace(SIZES[0], **change)


def test_wrong_arguments_are_told() -> None:
    sizes = SIZES[1]
    branches = draw(sizes, 21)
    window, position = given(branches.window), torch.tensor([[3], [4]])
    with pytest.raises(ValueError, match="'flash' is unknown"):
        sparse_attention(branches, sizes, impl="flash")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="need the block branch"):
        sparse_attention(Branches(selected=branches.selected), sizes)
    with pytest.raises(ValueError, match="no branch with a gate"):
        sparse_attention(Branches(replace(window, gate=None)), sizes)
    with pytest.raises(ValueError, match="G must divide H"):
        sparse_attention(Branches(replace(window, k=window.k[..., :2])), sizes)
    with pytest.raises(ValueError, match="gate"):
        sparse_attention(Branches(replace(window, gate=torch.ones(2, 21))), sizes)
    with pytest.raises(ValueError, match="use `cut_blocks`"):
        sparse_attention(Branches(block=window), sizes)
    with pytest.raises(ValueError, match="need leader_q"):
        sparse_attention(at(branches, position), sizes, position_BP=position)
