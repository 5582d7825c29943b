"""Benchmark of sparse attention against torch's fused dense attention, forward and backward."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from bench.compare import Case, compare
from bench.rows import Row
from torch.nn import functional as F

from findrec.ops.sparse_attention.attention import Branch, Branches, sparse_attention
from findrec.ops.sparse_attention.sizes import SparseSizes, sizes_for

IMPLS = ("dense", "sparse")
SHAPES = tuple((1, length, 4, 2, 32) for length in (1024, 2048, 4096, 8192, 16_384))  # B, L, H, G, h
LONG = 8192  # length from which only three runs are made: the baseline takes seconds
Shape = tuple[int, int, int, int, int]


def make_run(impl: str, shape: Shape, device: str = "cpu") -> Callable[[], None]:
    """Return a function that runs one forward and backward pass of `impl` on fixed random inputs.

    `last` is the forward pass at the last position only.
    """
    b, length, heads, groups, width = shape
    sizes = sizes_for(length)
    generator = torch.Generator().manual_seed(0)

    def number(*size: int) -> torch.Tensor:
        return torch.randn(*size, generator=generator).to(device).requires_grad_()

    if impl == "dense":
        q, k, v = (number(b, heads, length, width) for _ in range(3))
        grad = torch.ones_like(q)

        def run_dense() -> None:
            torch.autograd.grad(F.scaled_dot_product_attention(q, k, v, is_causal=True), (q, k, v), grad)

        return run_dense
    queries = 1 if impl == "last" else length
    counts = {"window": length, "block": sizes.num_blocks(length), "selected": length}
    parts = {
        name: Branch(
            number(b, queries, heads, width),
            number(b, keys, groups, width),
            number(b, keys, groups, width),
            number(b, queries, heads),
        )
        for name, keys in counts.items()
    }
    branches = Branches(**parts)
    return _last(sizes, branches, length) if impl == "last" else _training(sizes, branches)


def _training(sizes: SparseSizes, branches: Branches) -> Callable[[], None]:
    parts = list(branches.given().values())
    leaves = [x for each in parts for x in (each.q, each.k, each.v, each.gate) if x is not None]
    grad = torch.ones_like(parts[0].q)

    def run() -> None:
        torch.autograd.grad(sparse_attention(branches, sizes), leaves, grad)

    return run


def _last(sizes: SparseSizes, branches: Branches, length: int) -> Callable[[], None]:
    assert branches.block is not None
    position_BP = torch.full((len(branches.block.q), 1), length - 1, device=branches.block.q.device)
    leader_q = branches.block.q  # any queries: what they select does not matter

    @torch.no_grad()
    def run() -> None:
        sparse_attention(branches, sizes, position_BP=position_BP, leader_q=leader_q)

    return run


def bench_sparse_attention(shapes: Sequence[Shape] = SHAPES, runs: int = 11) -> list[Row]:
    """Measure dense and sparse attention at each `(B, L, H, G, h)`."""
    cases = [
        Case(
            shape,
            "B{} L{} H{} G{} h{}".format(*shape),
            IMPLS[:1],
            IMPLS[1:],
            min(runs, 3) if shape[1] >= LONG else runs,
        )
        for shape in shapes
    ]
    return compare("sparse_attention", cases, make_run)
