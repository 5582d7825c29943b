"""The Stein discrepancy in row tiles against the same formulas on whole matrices under autograd."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch

from findrec.bench.compare import Case, compare
from findrec.bench.rows import Row
from findrec.ops.stein_discrepancy import Impl, stein_discrepancy

SHAPES = ((512, 64), (2048, 64))  # n rows of either sample, D
IMPLS = ("reference", "tiled")


def make_run(impl: Impl, shape: tuple[int, int], device: str = "cpu") -> Callable[[], None]:
    """A function that does one forward and one backward pass of `impl` on fixed random inputs."""
    generator = torch.Generator().manual_seed(0)
    Z, A = (torch.randn(*shape, generator=generator).to(device) for _ in range(2))
    Z.requires_grad_()

    def run() -> None:
        torch.autograd.grad(stein_discrepancy(Z, A, impl=impl), Z)

    return run


def bench_stein(shapes: Sequence[tuple[int, int]] = SHAPES, runs: int = 11) -> list[Row]:
    """Rows of both implementations (Gaussian score, RBF kernel, bandwidth by the median) at each `(n, D)`."""
    cases = [Case(shape, "n{} D{}".format(*shape), IMPLS[:1], IMPLS[1:], runs) for shape in shapes]
    return compare("stein_discrepancy", cases, make_run)
