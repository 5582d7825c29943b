"""Autograd binding of the fused CPU kernel of the selective scan (`csrc/selective_scan.cpp`)."""

from __future__ import annotations

import ctypes
from functools import cache
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from findrec.ops._build import BuildError, load_library

_SIZES = ("rows", "steps", "channels", "states", "threads")
_STRIDED = ("u", "delta", "z", "B", "C", "dy")
_POINTERS = (
    *("u", "delta", "A", "B", "C", "D", "z", "first", "y", "last", "borders", "dy", "dlast"),
    *("du", "ddelta", "dA", "dB", "dC", "dD", "dz", "dfirst"),
)


class _ScanArgs(ctypes.Structure):
    """Mirrors `ScanArgs` in the C++ source, field by field."""

    _fields_ = [
        *((name, ctypes.c_int64) for name in _SIZES),
        *((f"{name}_{kind}", ctypes.c_int64) for name in _STRIDED for kind in ("row", "step")),
        *((name, ctypes.c_void_p) for name in _POINTERS),
    ]


def cpp_scan_problem() -> str | None:
    """Why the kernel is unavailable, or None. Builds the kernel on first use."""
    library = _library()
    return library if isinstance(library, str) else None


@cache
def _library() -> ctypes.CDLL | str:
    try:
        library = load_library("selective_scan")
    except BuildError as error:
        return str(error)
    library.scan_chunk.restype = ctypes.c_int64
    return library


def cpp_scan(
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

    Types below float32 are computed in float32; y has the type of `u`, the state that of the computation.
    """
    dtype = torch.promote_types(u.dtype, torch.float32)
    inputs = (
        *(_dense_rows(x, dtype) for x in (u, delta)),
        A.to(dtype).t().contiguous(),
        *(_dense_rows(x, dtype) for x in (B, C)),
        None if D is None else D.to(dtype).contiguous(),
        None if z is None else _dense_rows(z, dtype),
        None if initial_state is None else initial_state.to(dtype).transpose(1, 2).contiguous(),
    )
    y, last_BND = _FusedScan.apply(*inputs, want_last, torch.is_grad_enabled())  # type: ignore[no-untyped-call]
    return y.to(u.dtype), None if last_BND is None else last_BND.transpose(1, 2)


def _dense_rows(x: Tensor, dtype: torch.dtype) -> Tensor:
    """Make the last dimension contiguous, the only stride that the kernel requires.

    Halves of a projection are not copied. Of a value expanded over rows and steps, such as the gradient of a
    sum, only the value is copied.
    """
    x = x.to(dtype)
    if x.stride(-1) == 1:
        return x
    unexpanded = x[tuple(slice(0, 1) if stride == 0 else slice(None) for stride in x.stride()[:2])]
    return unexpanded.contiguous().expand(x.shape)


def _call(name: str, tensors: dict[str, Tensor | None]) -> None:
    """Call a function of the library on `tensors` (keyed by their names in `ScanArgs`)."""
    library = _library()
    if isinstance(library, str):
        raise RuntimeError(library)
    u, A = tensors["u"], tensors["A"]
    assert u is not None
    assert A is not None
    rows, steps, channels = u.shape
    # Waking the thread pool costs about as much as a few ten thousand states.
    threads = torch.get_num_threads() if u.numel() * len(A) > 2**14 else 1
    sizes = (rows, steps, channels, len(A), threads)
    fields: dict[str, int | None] = dict(zip(_SIZES, sizes, strict=True))
    for key, tensor in tensors.items():
        if tensor is None:
            continue
        fields[key] = tensor.data_ptr()
        if key in _STRIDED:
            fields[f"{key}_row"], fields[f"{key}_step"] = tensor.stride(0), tensor.stride(1)
    getattr(library, name)(ctypes.byref(_ScanArgs(**fields)), int(u.dtype == torch.float64))


class _FusedScan(torch.autograd.Function):
    """Saves only the inputs and the states at chunk borders for the backward pass."""

    @staticmethod
    def forward(
        ctx: Any,
        u: Tensor,
        delta: Tensor,
        A_ND: Tensor,
        B: Tensor,
        C: Tensor,
        D: Tensor | None,
        z: Tensor | None,
        first: Tensor | None,
        want_last: bool,
        want_grad: bool,
    ) -> tuple[Tensor, Tensor | None]:
        rows, steps = u.shape[:2]
        y = u.new_empty(u.shape)
        last = u.new_empty(rows, *A_ND.shape) if want_last else None
        borders = None
        if want_grad and any(ctx.needs_input_grad):
            borders = u.new_empty(rows, max(0, -(-steps // _chunk()) - 1), *A_ND.shape)
        inputs = {"u": u, "delta": delta, "A": A_ND, "B": B, "C": C, "D": D, "z": z, "first": first}
        _call("scan_forward", {**inputs, "y": y, "last": last, "borders": borders})
        ctx.save_for_backward(u, delta, A_ND, B, C, D, z, first, borders)
        ctx.set_materialize_grads(False)  # do not allocate zeros for an unused last state
        return y, last

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor | None, dlast: Tensor | None) -> tuple[Tensor | None, ...]:
        u, delta, A_ND, B, C, D, z, first, borders = ctx.saved_tensors
        channels = u.shape[2]
        new = u.new_empty
        grads: dict[str, Tensor | None] = {
            "du": new(u.shape),
            "ddelta": new(u.shape),
            "dA": new(A_ND.shape),
            "dB": new(B.shape),
            "dC": new(C.shape),
            "dD": new(channels),
            "dz": None if z is None else new(u.shape),
            "dfirst": None if first is None else new(first.shape),
        }
        inputs = {"u": u, "delta": delta, "A": A_ND, "B": B, "C": C, "D": D, "z": z, "first": first}
        # Bound to names, so that their memory stays valid during the kernel call.
        dy = u.new_zeros(channels).expand(u.shape) if dy is None else _dense_rows(dy, u.dtype)
        dlast = None if dlast is None else dlast.contiguous()
        outer = {"dy": dy, "dlast": dlast, "borders": borders}
        _call("scan_backward", {**inputs, **outer, **grads})
        if D is None:
            grads["dD"] = None
        return *grads.values(), None, None


def _chunk() -> int:
    """Steps from one border state to the next."""
    library = _library()
    if isinstance(library, str):
        raise RuntimeError(library)
    return int(library.scan_chunk())
