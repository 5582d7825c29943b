"""The selective scan against what one would write or install instead, forward and backward.

| baseline  | what |
|-----------|------|
| `unbind`  | the loop a careful person would write: one step after the other on views of the coefficients |
| `mambapy` | the parallel scan of the package mambapy, with its hand-written backward pass |

Views (`unbind` over time) are many times faster under autograd than indexing `x[:, l]`. Both baselines have
the discretisation, read-out, skip and gate of the scan itself.

Memory: `peak_bytes` is by how much one forward and backward pass raises the peak above the inputs `u`,
`delta`, `A`, `B`, `C`, `D`, `z` and the gradient of y, which are there before. So it counts y and the seven
gradients, which nobody can do without: they are 4/3 of the inputs' bytes where channels are many. Code that
the first call loads is not counted: a tiny scan has run before.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Callable, Sequence

import torch
from torch import Tensor
from torch.nn import functional as F

from findrec.bench.memory import peak_bytes, peak_cuda_bytes
from findrec.bench.rows import Row
from findrec.bench.timer import time_alternating
from findrec.ops.selective_scan import scan_backend, selective_scan
from findrec.progress import progress, say

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
MANY_STATES = 2**26  # runs times the B L D N states of a shape: beyond, a shape gets fewer runs
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
    """The same with the parallel scan of mambapy (Blelloch's, in place over 2 log2 L sweeps)."""
    from mambapy.pscan import pscan

    return _read_out(pscan(*_discretise(u, delta, A, B)), u, C, D, z)


def _discretise(u: Tensor, delta: Tensor, A: Tensor, B: Tensor) -> tuple[Tensor, Tensor]:
    """What each state is multiplied with and what is added to it, `[B, L, D, N]`."""
    return torch.exp(delta.unsqueeze(-1) * A), (delta * u).unsqueeze(-1) * B.unsqueeze(2)


def _read_out(states: Tensor, u: Tensor, C: Tensor, D: Tensor, z: Tensor) -> Tensor:
    y = (states @ C.unsqueeze(-1)).squeeze(-1)
    return (y + u * D) * F.silu(z)


def usable_baselines() -> tuple[str, ...]:
    """The baselines that can run here; says which cannot and how to have it."""
    if importlib.util.find_spec("mambapy") is not None:
        return BASELINES
    say(
        "Selective scan: the baseline 'mambapy' is left out, as the package is not installed.\n"
        "    pip install --no-deps mambapy==1.2.0    (or: pip install -e '.[bench]')"
    )
    return tuple(name for name in BASELINES if name != "mambapy")


def make_run(impl: str, shape: Shape, device: str = "cpu") -> Callable[[], None]:
    """A function that does one forward and one backward pass on fixed random inputs.

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


def make_warm_run(impl: str, shape: Shape) -> Callable[[], None]:
    """`make_run` on the CPU after a tiny run that loads all code."""
    make_run(impl, (1, 4, 4, shape[3]))()
    return make_run(impl, shape)


def input_bytes(shape: Shape) -> int:
    """The bytes of u, delta, A, B, C, D and z in float32: what `peak_bytes` is to be compared with."""
    batch, length, width, states = shape
    return 4 * (batch * length * (3 * width + 2 * states) + width * (states + 1))


def bench_scan(shapes: Sequence[Shape] = SHAPES, runs: int = 11) -> list[Row]:
    """Rows of each baseline, then of the implementation `auto` picks here against each, at each shape."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    baselines = usable_baselines()
    ours = scan_backend(device)  # outside the clock: it may build the kernel
    rows = []
    with progress("selective scan", total=len(shapes), unit="shapes") as bar:
        for shape in shapes:
            rows += _bench_shape(shape, ours, baselines, runs, device)
            bar.advance()
    return rows


def _bench_shape(shape: Shape, ours: str, baselines: Sequence[str], runs: int, device: str) -> list[Row]:
    batch, length, width, states = shape
    functions = {name: make_run(name, shape, device) for name in (*baselines, ours)}
    affordable = max(FEWEST_RUNS, MANY_STATES // (batch * length * width * states))
    wait = torch.cuda.synchronize if device == "cuda" else lambda: None
    timings = time_alternating(functions, runs=min(runs, affordable), wait=wait)
    if device == "cuda":
        peaks = {name: peak_cuda_bytes(function) for name, function in functions.items()}
    else:
        del functions  # their inputs need not be in memory beside those of the measured processes
        peaks = {name: peak_bytes(make_warm_run, name, shape) for name in timings}
    pairs = [(name, name) for name in baselines] + [(ours, name) for name in baselines]
    return [
        Row(
            op="selective_scan",
            shape=f"B{batch} L{length} D{width} N{states}",
            dtype="float32",
            impl=name,
            baseline=baseline,
            median_s=timings[name].median_s,
            p10_s=timings[name].p10_s,
            peak_bytes=peaks[name],
            ratio=timings[baseline].median_s / timings[name].median_s,
        )
        for name, baseline in pairs
    ]
