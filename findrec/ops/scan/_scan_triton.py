"""Autograd binding of the Triton kernels of the selective scan (`_triton_kernels`)."""

from __future__ import annotations

import importlib.util
import math
import os
from contextlib import nullcontext
from functools import cache
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from findrec.ops.scan._trial import trial

MAX_STATES = 1024  # of a channel; their tile has to stay in registers
_TILE = 4096  # states of a chunk and block of channels


def triton_problem(device: torch.device | str) -> str | None:
    """Why the kernels cannot run on a device, or None. The first call compiles and runs a small scan."""
    kind = torch.device(device).type
    if importlib.util.find_spec("triton") is None:
        return "the package triton is not installed"
    if kind == "cuda":
        return _problem(kind)
    if kind == "cpu" and os.environ.get("TRITON_INTERPRET") == "1":
        return None  # Triton's interpreter, for tests
    return "it needs a CUDA device"


@cache
def _problem(device: str) -> str | None:
    return trial(_bare_scan, device)


def _bare_scan(u: Tensor, delta: Tensor, A: Tensor, B: Tensor, C: Tensor) -> Tensor:
    return triton_scan(u, delta, A, B, C, None, None, None, want_last=False)[0]


def triton_call_problem(A: Tensor) -> str | None:
    """Why the kernels cannot run a call with these decay rates, or None."""
    return f"takes at most {MAX_STATES} states" if A.shape[1] > MAX_STATES else None


def triton_scan(
    u: Tensor,
    delta: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None,
    z: Tensor | None,
    initial_state: Tensor | None,
    *,
    want_last: bool,
) -> tuple[Tensor, Tensor | None]:
    """`y [B, L, D]` and, if wanted, the last state `[B, D, N]`; arguments as in `selective_scan`.

    Every tensor is read in its own type and layout; y and the gradients have the types of u and of their
    tensors. States and sums are float32, or float64 if u is.
    """
    results: tuple[Tensor, Tensor | None] = _TritonScan.apply(  # type: ignore[no-untyped-call]
        u, delta, A, B, C, D, z, initial_state, want_last, torch.is_grad_enabled()
    )
    return results


def _tile(channels: int, num_states: int) -> dict[str, int]:
    """Sizes of a tile, powers of two: about `_TILE` states, and no more channels than there are."""
    states = max(4, _power_of_2(num_states))
    room = max(4, _TILE // states)
    steps = min(16, _power_of_2(math.isqrt(room)))
    return {
        "STEPS": steps,
        "CHANNELS": max(2, min(64, room // steps, _power_of_2(channels))),
        "STATES": states,
    }


def _power_of_2(number: int) -> int:
    """The smallest power of two that is not below `number`."""
    return 1 << (number - 1).bit_length()


def _launch(kernel: Any, tensors: tuple[Tensor | None, ...], strided: tuple[Tensor | None, ...]) -> None:
    """Run a kernel with a program for each row and block of channels.

    Args:
        kernel: one of `_triton_kernels`.
        tensors: its tensors; the first is u and the third A.
        strided: those whose strides it takes, in its order; for None, zeros are passed.
    """
    from triton import language as tl

    u, A = tensors[0], tensors[2]
    assert u is not None
    assert A is not None
    rows, length, channels = u.shape
    tile = _tile(channels, A.shape[1])
    strides = [stride for x in strided for stride in ((0, 0, 0) if x is None else x.stride())]
    wide = tl.float64 if u.dtype == torch.float64 else tl.float32
    warps = max(1, min(8, math.prod(tile.values()) // 512))
    # Triton launches on the current device, which need not be that of the tensors.
    with torch.cuda.device(u.device) if u.is_cuda else nullcontext():
        kernel[rows, _blocks(channels, tile)](
            *tensors, length, channels, A.shape[1], *strides, WIDE=wide, **tile, num_warps=warps
        )


def _blocks(channels: int, tile: dict[str, int]) -> int:
    """Blocks of channels of a row."""
    return -(-channels // tile["CHANNELS"])


class _TritonScan(torch.autograd.Function):
    """Saves only the inputs and the states at chunk borders for the backward pass."""

    @staticmethod
    def forward(
        ctx: Any,
        u: Tensor,
        delta: Tensor,
        A: Tensor,
        B: Tensor,
        C: Tensor,
        D: Tensor | None,
        z: Tensor | None,
        first: Tensor | None,
        want_last: bool,
        want_grad: bool,
    ) -> tuple[Tensor, Tensor | None]:
        from findrec.ops.scan._triton_kernels import scan_forward

        A = A.contiguous()
        D, first = (None if x is None else x.contiguous() for x in (D, first))
        rows, length, channels = u.shape
        wide = torch.promote_types(u.dtype, torch.float32)
        y = u.new_empty(u.shape)
        last = u.new_empty(rows, *A.shape, dtype=wide) if want_last else None
        borders = None
        if want_grad and any(ctx.needs_input_grad):
            chunks = -(-length // _tile(channels, A.shape[1])["STEPS"])
            borders = u.new_empty(rows, max(0, chunks - 1), *A.shape, dtype=wide)
        tensors = (u, delta, A, B, C, D, z, first, y, borders, last)
        _launch(scan_forward, tensors, (u, delta, B, C, z))
        ctx.save_for_backward(u, delta, A, B, C, D, z, first, borders)
        ctx.set_materialize_grads(False)  # do not allocate zeros for an unused last state
        return y, last

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor | None, dlast: Tensor | None) -> tuple[Tensor | None, ...]:
        from findrec.ops.scan._triton_kernels import scan_backward

        u, delta, A, B, C, D, z, first, borders = ctx.saved_tensors
        rows, length, channels = u.shape
        wide = borders.dtype
        if dy is None:
            dy = u.new_zeros(()).expand(u.shape)
        dlast = None if dlast is None else dlast.contiguous()
        du, ddelta, dz = (None if x is None else x.new_empty(x.shape) for x in (u, delta, z))
        # Summed below in a fixed order: over rows, and over blocks of channels.
        dA = u.new_empty(rows, *A.shape, dtype=wide)
        dD = None if D is None else u.new_empty(rows, channels, dtype=wide)
        parts = (rows, _blocks(channels, _tile(channels, A.shape[1])), length, A.shape[1])
        dB, dC = (u.new_empty(parts, dtype=wide) for _ in range(2))
        dfirst = None if first is None else first.new_empty(first.shape)
        inputs = (u, delta, A, B, C, D, z, first, borders, dy, dlast)
        grads = (du, ddelta, dA, dB, dC, dD, dz, dfirst)
        _launch(scan_backward, inputs + grads, (u, delta, B, C, z, dy))
        dA, dD = (None if x is None else x.sum(0).to(like.dtype) for x, like in ((dA, A), (dD, D)))
        dB, dC = (x.sum(1).to(like.dtype) for x, like in ((dB, B), (dC, C)))
        return du, ddelta, dA, dB, dC, dD, dz, dfirst, None, None
