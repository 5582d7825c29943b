"""Autograd binding of the CUDA kernels of the package mamba-ssm, the extension module `selective_scan_cuda`.

The module is imported by itself: `import mamba_ssm` loads all of the package's language models and takes
seconds, and newer releases import without the kernels, which then fail at the first scan.

The kernels want channels before steps (`[B, D, L]`, steps adjacent), parameters in float32 and everything
else in one type. They add the gradients of A, B, C and D atomically, in no fixed order. Written for the
interface of mamba-ssm 2.2 and 2.3.
"""

from __future__ import annotations

import importlib
import importlib.util
from functools import cache
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from findrec.ops.scan._trial import trial

MAX_STATES = 256
MAX_CHANNELS = 65_535  # a dimension of the grid that the kernels are launched on
_ALIGNMENT = 16  # bytes: the kernels read 16 at once where the number of steps allows


def mamba_problem(device: torch.device | str) -> str | None:
    """Why the kernels cannot run on a device, or None. On the first call it runs a small scan."""
    if torch.device(device).type != "cuda":
        return "it needs a CUDA device and the package mamba-ssm, built with its CUDA kernels"
    return _problem(torch.device(device).type)


@cache
def _problem(device: str) -> str | None:
    if importlib.util.find_spec("selective_scan_cuda") is None:
        return "its kernels, the module selective_scan_cuda, are not installed"
    return trial(_bare_scan, device)


def _bare_scan(u: Tensor, delta: Tensor, A: Tensor, B: Tensor, C: Tensor) -> Tensor:
    return mamba_scan(u, delta, A, B, C, None, None)[0]


def mamba_call_problem(
    inputs: tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor | None, Tensor | None, Tensor | None],
    want_last: bool,
) -> str | None:
    """Why the kernels cannot run this call (arguments of `selective_scan`), or None."""
    u, A, initial_state = inputs[0], inputs[2], inputs[-1]
    if initial_state is not None:
        return "takes no initial state"
    if u.dtype not in (torch.float32, torch.float16, torch.bfloat16):
        return f"knows no {str(u.dtype).removeprefix('torch.')}"
    if u.numel() == 0:
        return "takes no empty tensors"
    if A.shape[1] > MAX_STATES or A.shape[0] > MAX_CHANNELS:
        return f"takes at most {MAX_STATES} states and {MAX_CHANNELS} channels"
    if u.numel() >= 2**32:
        return "counts elements in 32 bits"
    if torch.is_grad_enabled() and any(x is not None and x.requires_grad for x in inputs):
        if want_last:
            return "gives no gradient through the last state"
        if torch.are_deterministic_algorithms_enabled():
            return "adds gradients in no fixed order"
    return None


def mamba_scan(
    u: Tensor, delta: Tensor, A: Tensor, B: Tensor, C: Tensor, D: Tensor | None, z: Tensor | None
) -> tuple[Tensor, Tensor]:
    """`y [B, L, D]` and the last state `[B, D, N]`, which has no gradient."""
    wide = (A.float(), None if D is None else D.float())
    y, last = _MambaScan.apply(  # type: ignore[no-untyped-call]
        u,
        delta.to(u.dtype),
        wide[0],
        B.to(u.dtype),
        C.to(u.dtype),
        wide[1],
        None if z is None else z.to(u.dtype),
    )
    return y, last


def _steps_last(x_BLD: Tensor) -> Tensor:
    """`[B, L, D]` to `[B, D, L]`, contiguous and aligned."""
    x_BDL = x_BLD.transpose(1, 2).contiguous()
    return x_BDL if x_BDL.data_ptr() % _ALIGNMENT == 0 else x_BDL.clone()


class _MambaScan(torch.autograd.Function):
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
    ) -> tuple[Tensor, Tensor]:
        kernels = importlib.import_module("selective_scan_cuda")
        A, D = A.contiguous(), None if D is None else D.contiguous()
        u, delta = _steps_last(u), _steps_last(delta)
        # The kernels know groups of channels with a B and a C of their own: here one group.
        B, C = _steps_last(B).unsqueeze(1), _steps_last(C).unsqueeze(1)
        z = None if z is None else _steps_last(z)
        no_bias, softplus = None, False  # delta comes ready
        y, states, *gated = kernels.fwd(u, delta, A, B, C, D, z, no_bias, softplus)
        ctx.save_for_backward(u, delta, A, B, C, D, z, states, None if z is None else y)
        # At the end of each of the kernel's chunks: the product of decays, and the state, alternating.
        last = states[:, :, -1, 1::2].contiguous()
        ctx.mark_non_differentiable(last)
        ctx.set_materialize_grads(False)
        return (gated[0] if gated else y).transpose(1, 2), last

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor | None, _: Tensor | None) -> tuple[Tensor | None, ...]:
        if dy is None:
            return (None,) * 7
        kernels = importlib.import_module("selective_scan_cuda")
        u, delta, A, B, C, D, z, states, y = ctx.saved_tensors
        no_bias, dz, softplus, recompute = None, None, False, False
        du, ddelta, dA, dB, dC, dD, _, *rest = kernels.bwd(
            u, delta, A, B, C, D, z, no_bias, _steps_last(dy), states, y, dz, softplus, recompute
        )
        du, ddelta, dz = (None if x is None else x.transpose(1, 2) for x in (du, ddelta, *(rest or [None])))
        dB, dC = (x.squeeze(1).transpose(1, 2) for x in (dB, dC))
        return du, ddelta, dA, dB, dC, None if D is None else dD, dz
