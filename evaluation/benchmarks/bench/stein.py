"""Benchmark of the Stein discrepancy in row tiles against full matrices under autograd."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from bench.compare import Case, compare
from bench.rows import Row

from findrec.ops.stein.stein_discrepancy import Impl, stein_discrepancy

SHAPES = ((512, 64), (2048, 64))  # n rows of either sample, D
IMPLS = ("reference", "tiled")


def make_run(impl: Impl, shape: tuple[int, int], device: str = "cpu") -> Callable[[], None]:
    """Return a function that runs one forward and backward pass of `impl` on fixed random inputs."""
    generator = torch.Generator().manual_seed(0)
    Z, A = (torch.randn(*shape, generator=generator).to(device) for _ in range(2))
    Z.requires_grad_()

    def run() -> None:
        torch.autograd.grad(stein_discrepancy(Z, A, impl=impl), Z)

    return run


def bench_stein(shapes: Sequence[tuple[int, int]] = SHAPES, runs: int = 11) -> list[Row]:
    """Measure both implementations (Gaussian score, RBF kernel, median bandwidth) at each `(n, D)`."""
    cases = [Case(shape, "n{} D{}".format(*shape), IMPLS[:1], IMPLS[1:], runs) for shape in shapes]
    return compare("stein_discrepancy", cases, make_run)
