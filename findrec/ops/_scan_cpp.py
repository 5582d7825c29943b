"""The fused CPU kernel of the selective scan (`csrc/selective_scan.cpp`) under autograd."""

from __future__ import annotations

import ctypes
from functools import cache
from typing import Any

import torch
from torch import Tensor

from findrec.ops._build import BuildError, load_library

_SIZES = ("rows", "steps", "channels", "states", "threads")
_STRIDED = ("u", "delta", "z", "B", "C")
_POINTERS = (
    *("u", "delta", "A", "B", "C", "D", "z", "first", "y", "last", "borders", "dy", "dlast"),
    *("du", "ddelta", "dA", "dB", "dC", "dD", "dz", "dfirst", "part_BC", "part_A", "part_D"),
)


class _ScanArgs(ctypes.Structure):
    """Field by field the `ScanArgs` of the C++ source."""

    _fields_ = [
        *((name, ctypes.c_int64) for name in _SIZES),
        *((f"{name}_{kind}", ctypes.c_int64) for name in _STRIDED for kind in ("row", "step")),
        *((name, ctypes.c_void_p) for name in _POINTERS),
    ]


def cpp_scan_problem() -> str | None:
    """Why the kernel cannot be used here, or None. Builds it when that was not done yet."""
    found = _library()
    return found if isinstance(found, str) else None


@cache
def _library() -> ctypes.CDLL | str:
    try:
        library = load_library("selective_scan")
    except BuildError as error:
        return str(error)
    library.scan_chunk.restype = library.scan_block.restype = ctypes.c_int64
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
) -> tuple[Tensor, Tensor]:
    """`y [B, L, D]` and the last state `[B, D, N]`; arguments as in `selective_scan`, float32 or float64."""
    y, last_BND = _FusedScan.apply(  # type: ignore[no-untyped-call]
        *(_dense_rows(x, u.dtype) for x in (u, delta)),
        A.to(u.dtype).t().contiguous(),
        *(_dense_rows(x, u.dtype) for x in (B, C)),
        None if D is None else D.to(u.dtype).contiguous(),
        None if z is None else _dense_rows(z, u.dtype),
        None if initial_state is None else initial_state.to(u.dtype).transpose(1, 2).contiguous(),
    )
    return y, last_BND.transpose(1, 2)


def _dense_rows(x: Tensor, dtype: torch.dtype) -> Tensor:
    """The kernel takes any strides but needs the last dimension dense: halves of a projection are no copy."""
    x = x.to(dtype)
    return x if x.stride(-1) == 1 else x.contiguous()


def _call(name: str, tensors: dict[str, Tensor | None]) -> None:
    """Run a function of the library on `tensors` (by their names in `ScanArgs`)."""
    library = _library()
    assert isinstance(library, ctypes.CDLL)
    u, A = tensors["u"], tensors["A"]
    assert u is not None
    assert A is not None
    rows, steps, channels = u.shape
    sizes = (rows, steps, channels, len(A), torch.get_num_threads())
    fields: dict[str, int | None] = dict(zip(_SIZES, sizes, strict=True))
    for key, tensor in tensors.items():
        if tensor is None:
            continue
        fields[key] = tensor.data_ptr()
        if key in _STRIDED:
            fields[f"{key}_row"], fields[f"{key}_step"] = tensor.stride(0), tensor.stride(1)
    getattr(library, name)(ctypes.byref(_ScanArgs(**fields)), int(u.dtype == torch.float64))


class _FusedScan(torch.autograd.Function):
    """States at chunk borders are all that is kept for the backward pass."""

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
    ) -> tuple[Tensor, Tensor]:
        library = _library()
        if isinstance(library, str):
            raise RuntimeError(library)
        rows, steps = u.shape[:2]
        num_chunks = -(-steps // library.scan_chunk())
        y, last = u.new_empty(u.shape), u.new_empty(rows, *A_ND.shape)
        borders = u.new_empty(rows, num_chunks, *A_ND.shape)
        inputs = {"u": u, "delta": delta, "A": A_ND, "B": B, "C": C, "D": D, "z": z, "first": first}
        _call("scan_forward", {**inputs, "y": y, "last": last, "borders": borders})
        ctx.save_for_backward(u, delta, A_ND, B, C, D, z, first, borders)
        return y, last

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        u, delta, A_ND, B, C, D, z, first, borders = ctx.saved_tensors
        library = _library()
        assert isinstance(library, ctypes.CDLL)
        rows, steps, channels = u.shape
        states = len(A_ND)
        num_blocks = -(-channels // library.scan_block(int(u.dtype == torch.float64)))
        new = u.new_empty
        out: dict[str, Tensor | None] = {
            "du": new(u.shape),
            "ddelta": new(u.shape),
            "dA": new(A_ND.shape),
            "dB": new(B.shape),
            "dC": new(C.shape),
            "dD": new(channels),
            "dz": None if z is None else new(u.shape),
            "dfirst": new(rows, states, channels),
        }
        scratch = {
            "part_BC": new(num_blocks, rows, steps, 2, states),
            "part_A": new(rows, states, channels),
            "part_D": new(rows, channels),
        }
        inputs = {"u": u, "delta": delta, "A": A_ND, "B": B, "C": C, "D": D, "z": z, "borders": borders}
        # Named so that they live until the kernel is done with their memory.
        dy, dlast = (grad.contiguous() for grad in grads)
        _call("scan_backward", {**inputs, **out, **scratch, "dy": dy, "dlast": dlast})
        unused = {"dD": D, "dfirst": first}
        return tuple(None if name in unused and unused[name] is None else grad for name, grad in out.items())
