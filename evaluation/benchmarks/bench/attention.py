"""Benchmark of cross-modal attention: a window against the full history, both with torch's fused kernel."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from bench.compare import Case, compare
from bench.rows import Row

from findrec.ops.cross_modal_attention import cross_modal_attention

WINDOW = 256
IMPLS = ("full", f"window {WINDOW}")
SHAPES = ((1, 1, 1024, 4, 16), (1, 1, 4096, 4, 16), (1, 1, 16_384, 4, 16))  # M, B, L, H, h
LONG = 16_384  # length from which only three runs are made: the baseline takes seconds


def make_run(impl: str, shape: tuple[int, int, int, int, int], device: str = "cpu") -> Callable[[], None]:
    """Return a function that runs one forward and backward pass of `impl` on fixed random inputs."""
    num_modal, rows, length, heads, width = shape
    generator = torch.Generator().manual_seed(0)
    ids = torch.randn(rows, length, 3, heads, width, generator=generator).to(device).requires_grad_()
    modal = torch.randn(num_modal, rows, length, 3, heads, width, generator=generator).to(device)
    modal.requires_grad_()
    grads = [torch.ones_like(modal[:, :, :, 0]) for _ in range(2)]

    def run() -> None:
        read = cross_modal_attention(ids, modal, window=None if impl == "full" else WINDOW)
        torch.autograd.grad(read, (ids, modal), grads)

    return run


def bench_attention(shapes: Sequence[tuple[int, int, int, int, int]] = SHAPES, runs: int = 11) -> list[Row]:
    """Measure full and windowed attention at each `(M, B, L, H, h)`."""
    cases = [
        Case(
            shape,
            "M{} B{} L{} H{} h{}".format(*shape),
            IMPLS[:1],
            IMPLS[1:],
            min(runs, 3) if shape[2] >= LONG else runs,
        )
        for shape in shapes
    ]
    return compare("cross_modal_attention", cases, make_run)
