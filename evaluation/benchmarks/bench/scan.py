"""Benchmark of the selective scan against two baselines, forward and backward.

| baseline  | description |
|-----------|-------------|
| `unbind`  | a loop over time steps on views of the coefficients |
| `mambapy` | the parallel scan of the package mambapy, with its hand-written backward pass |

Views (`unbind` over time) are many times faster under autograd than indexing `x[:, l]`. Both baselines
include the discretisation, read-out, skip and gate.

`peak_bytes` is the peak of one forward and backward pass above the inputs `u`, `delta`, `A`, `B`, `C`, `D`,
`z` and the gradient of y. It includes y and the seven gradients, about 4/3 of the inputs' bytes with many
channels. Code loaded by the first call is not counted: a tiny scan runs before.
"""

from __future__ import annotations

import contextlib
import importlib.util
import math
from collections.abc import Callable, Sequence

import torch
from bench.compare import Case, compare
from bench.rows import Row
from torch import Tensor
from torch.nn import functional as F

from findrec.errors import FindRecError
from findrec.ops.scan.selective_scan import scan_backend, selective_scan
from findrec.progress import say

Shape = tuple[int, int, int, int]  # B, L, D, N

SHAPES: tuple[Shape, ...] = (
    (64, 50, 256, 16),
    (16, 512, 256, 16),
    (2, 4096, 256, 16),
    (1, 16384, 256, 16),
    (12, 200, 128, 16),
    (2, 1024, 128, 16),
)
BASELINES = ("unbind", "mambapy")
MANY_STATES = 2**26  # maximum of runs x states (B L D N) of a shape, which limits the runs
FEWEST_RUNS = 3


def unbind_scan(u: Tensor, delta: Tensor, A: Tensor, B: Tensor, C: Tensor, D: Tensor, z: Tensor) -> Tensor:
    """Mamba-1's recurrence (arXiv 2312.00752, alg. 2) in plain torch: `[B, L, D]` in and out."""
    decay, drive = _discretise(u, delta, A, B)
    state = torch.zeros_like(drive[:, 0])
    states = []
    for decay_l, drive_l in zip(decay.unbind(1), drive.unbind(1), strict=True):
        state = decay_l * state + drive_l
        states.append(state)
    return _read_out(torch.stack(states, 1), u, C, D, z)


def mambapy_scan(u: Tensor, delta: Tensor, A: Tensor, B: Tensor, C: Tensor, D: Tensor, z: Tensor) -> Tensor:
    """The same recurrence with mambapy's parallel scan (Blelloch's, in place over 2 log2 L sweeps)."""
    from mambapy.pscan import pscan

    return _read_out(pscan(*_discretise(u, delta, A, B)), u, C, D, z)


def _discretise(u: Tensor, delta: Tensor, A: Tensor, B: Tensor) -> tuple[Tensor, Tensor]:
    """Decay and input of each state, `[B, L, D, N]` each."""
    return torch.exp(delta.unsqueeze(-1) * A), (delta * u).unsqueeze(-1) * B.unsqueeze(2)


def _read_out(states: Tensor, u: Tensor, C: Tensor, D: Tensor, z: Tensor) -> Tensor:
    y = (states @ C.unsqueeze(-1)).squeeze(-1)
    return (y + u * D) * F.silu(z)


def usable_baselines() -> tuple[str, ...]:
    """The installed baselines; prints how to install a missing one."""
    if importlib.util.find_spec("mambapy") is not None:
        return BASELINES
    say(
        "Selective scan: the baseline 'mambapy' is skipped, as the package is not installed.\n"
        "    pip install --no-deps mambapy==1.2.0    (or: pip install -e '.[bench]')"
    )
    return tuple(name for name in BASELINES if name != "mambapy")


def make_run(impl: str, shape: Shape, device: str = "cpu") -> Callable[[], None]:
    """Return a function that runs one forward and backward pass on fixed random inputs.

    `impl` is one of `BASELINES` or an implementation of `selective_scan`.
    """
    batch, length, width, states = shape
    generator = torch.Generator().manual_seed(0)

    def draw(*size: int) -> Tensor:
        return torch.randn(*size, generator=generator).to(device)

    u, z, grad = (draw(batch, length, width) for _ in range(3))
    delta = F.softplus(draw(batch, length, width) - 2)
    b, c = draw(batch, length, states), draw(batch, length, states)
    a, d = -torch.exp(draw(width, states)), draw(width)
    inputs = [x.requires_grad_() for x in (u, delta, a, b, c, d, z)]
    baseline = {"unbind": unbind_scan, "mambapy": mambapy_scan}.get(impl)

    def run() -> None:
        y = baseline(*inputs) if baseline else selective_scan(*inputs, impl=impl)
        torch.autograd.grad(y, inputs, grad)

    return run


def make_warm_run(impl: str, shape: Shape, device: str = "cpu") -> Callable[[], None]:
    """Call `make_run` after a tiny run that loads all code."""
    make_run(impl, (1, 4, 4, shape[3]), device)()
    return make_run(impl, shape, device)


def input_bytes(shape: Shape) -> int:
    """Bytes of u, delta, A, B, C, D and z in float32, to compare with `peak_bytes`."""
    batch, length, width, states = shape
    return 4 * (batch * length * (3 * width + 2 * states) + width * (states + 1))


def our_impls(device: str) -> list[str]:
    """The implementation that `auto` selects, and on CUDA also `triton` if it works."""
    chosen = [scan_backend(device)]  # before timing, as it may build the kernel
    if device == "cuda" and "triton" not in chosen:
        with contextlib.suppress(FindRecError):
            chosen.append(scan_backend(device, "triton"))
    return chosen


def bench_scan(shapes: Sequence[Shape] = SHAPES, runs: int = 11) -> list[Row]:
    """Measure each baseline, and our implementations against each, at each shape."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    baselines = usable_baselines()
    ours = our_impls(device)
    cases = [
        Case(
            shape,
            "B{} L{} D{} N{}".format(*shape),
            baselines,
            ours,
            min(runs, max(FEWEST_RUNS, MANY_STATES // math.prod(shape))),
        )
        for shape in shapes
    ]
    return compare("selective_scan", cases, make_run, make_warm_run)
