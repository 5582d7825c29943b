"""The selective scan against the loop a careful person would write, forward and backward.

The baseline is no straw man: coefficients are formed for all steps at once and each step takes views
(`unbind`), which is several times faster under autograd than indexing `x[:, l]`.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor
from torch.nn import functional as F

from findrec.bench.memory import peak_bytes, peak_cuda_bytes
from findrec.bench.rows import Row
from findrec.bench.timer import time_alternating
from findrec.ops.selective_scan import scan_backend, selective_scan
from findrec.progress import progress

SHAPES = ((12, 200, 128, 16), (2, 1024, 128, 16), (1, 4096, 128, 16))  # B, L, D, N
BASELINE = "unbind_loop"


def unbind_loop(u: Tensor, delta: Tensor, A: Tensor, B: Tensor, C: Tensor, D: Tensor, z: Tensor) -> Tensor:
    """Mamba-1's recurrence (arXiv 2312.00752, alg. 2) in plain torch: `[B, L, D]` in and out."""
    decay = torch.exp(delta.unsqueeze(-1) * A)  # [B, L, D, N]
    drive = (delta * u).unsqueeze(-1) * B.unsqueeze(2)
    state = torch.zeros_like(drive[:, 0])
    states = []
    for decay_l, drive_l in zip(decay.unbind(1), drive.unbind(1), strict=True):
        state = decay_l * state + drive_l
        states.append(state)
    y = torch.einsum("bldn,bln->bld", torch.stack(states, 1), C)
    return (y + u * D) * F.silu(z)


def make_run(impl: str, shape: tuple[int, int, int, int], device: str = "cpu") -> Callable[[], None]:
    """A function that does one forward and one backward pass of `impl` on fixed random inputs."""
    batch, length, width, states = shape
    generator = torch.Generator().manual_seed(0)

    def draw(*size: int) -> Tensor:
        return torch.randn(*size, generator=generator).to(device)

    u, z, grad = (draw(batch, length, width) for _ in range(3))
    delta = F.softplus(draw(batch, length, width) - 2)
    b, c = draw(batch, length, states), draw(batch, length, states)
    a, d = -torch.exp(draw(width, states)), draw(width)
    inputs = [x.requires_grad_() for x in (u, delta, a, b, c, d, z)]

    def run() -> None:
        y = unbind_loop(*inputs) if impl == BASELINE else selective_scan(*inputs, impl=impl)
        torch.autograd.grad(y, inputs, grad)

    return run


def bench_scan(shapes: Sequence[tuple[int, int, int, int]] = SHAPES, runs: int = 11) -> list[Row]:
    """Rows of the implementation `auto` picks here and of the baseline, at each `(B, L, D, N)`."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    ours = scan_backend(device)  # outside the clock: it may build the kernel
    rows = []
    with progress("selective scan", total=len(shapes), unit="shapes") as bar:
        for shape in shapes:
            functions = {name: make_run(name, shape, device) for name in (BASELINE, ours)}
            wait = torch.cuda.synchronize if device == "cuda" else lambda: None
            timings = time_alternating(functions, runs=runs, wait=wait)
            for name, timing in timings.items():
                if device == "cuda":
                    peak = peak_cuda_bytes(functions[name])
                else:
                    peak = peak_bytes(make_run, name, shape, device)
                rows.append(
                    Row(
                        op="selective_scan",
                        shape="B{} L{} D{} N{}".format(*shape),
                        dtype="float32",
                        impl=name,
                        baseline=BASELINE,
                        median_s=timing.median_s,
                        p10_s=timing.p10_s,
                        peak_bytes=peak,
                        ratio=timings[BASELINE].median_s / timing.median_s,
                    )
                )
            bar.advance()
    return rows
