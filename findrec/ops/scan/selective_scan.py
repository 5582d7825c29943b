"""Selective scan of Mamba-1: a linear recurrence with coefficients from the input (arXiv 2312.00752, alg. 2).

    h_l = exp(delta_l A) h_{l-1} + delta_l B_l u_l          y_l = C_l h_l + D u_l,   then   y_l * silu(z_l)

Tensors are `[B, L, D]` (channels last). No implementation but `reference` stores a state for every step:
states are kept at chunk borders and recomputed in the backward pass, so memory is O(B L D). `selective_scan`
takes whole histories; `selective_scan_step` appends one event to a state, at a cost without L in it.

| impl        | where             | what                                                                  |
|-------------|-------------------|-----------------------------------------------------------------------|
| `reference` | anywhere          | plain loop under autograd, any dtype: reference for the tests         |
| `torch`     | anywhere          | chunks of whole-tensor operations, hand-written backward              |
| `cpp`       | CPU, needs g++    | one fused kernel for each direction, built at first use               |
| `mamba_ssm` | CUDA              | the kernel of the mamba-ssm package                                   |

All are deterministic on CPU for a fixed number of threads (`cpp` for any number).
States are accumulated in at least float32, also for bfloat16 tensors.
Shape letters: B rows, L steps, D channels, N states of a channel.
"""

from __future__ import annotations

import importlib.util
from functools import cache
from typing import Literal, overload

import torch
from torch import Tensor
from torch.nn import functional as F

from findrec.errors import FindRecError
from findrec.ops.scan._scan_cpp import cpp_scan, cpp_scan_problem
from findrec.ops.scan._scan_torch import ChunkedScan, reference_scan, step_states
from findrec.progress import warn

IMPLS = ("auto", "reference", "torch", "cpp", "mamba_ssm")


def scan_backend(device: torch.device | str, impl: str = "auto") -> str:
    """The implementation that `impl` selects on a device. May build the CPU kernel.

    Raises `FindRecError` when `impl` is unknown or unavailable.
    """
    kind = torch.device(device).type
    if impl not in IMPLS:
        raise FindRecError(f"scan implementation {impl!r} is unknown: choose one of {', '.join(IMPLS)}")
    if impl == "auto":
        return _best(kind)
    if impl == "cpp" and (problem := "it runs on the CPU only" if kind != "cpu" else cpp_scan_problem()):
        raise FindRecError(f"scan implementation 'cpp' cannot be used on {kind}: {problem}; try 'auto'")
    if impl == "mamba_ssm" and (kind != "cuda" or not _has_mamba_ssm()):
        raise FindRecError(
            f"scan implementation 'mamba_ssm' cannot be used on {kind}: it needs a CUDA device and the "
            "package mamba-ssm with its CUDA kernels (pip install findrec[gpu]); or use 'auto'"
        )
    return impl


@cache
def _best(kind: str) -> str:
    """The implementation that `auto` selects; warns once when it is not the fast one."""
    if kind == "cuda":
        if _has_mamba_ssm():
            return "mamba_ssm"
        reason = "mamba_ssm with its CUDA kernels cannot be imported"
    elif kind == "cpu":
        problem = cpp_scan_problem()
        if problem is None:
            return "cpp"
        reason = problem
    else:
        reason = f"there is no kernel for {kind}"
    warn(
        "!"
        * 80
        + f"\nSelective scan: {reason}.\nUsing the slower torch implementation; results are the same "
        "up to rounding, training takes several times longer.\n" + "!" * 80
    )
    return "torch"


@cache
def _has_mamba_ssm() -> bool:
    if importlib.util.find_spec("mamba_ssm") is None:
        return False
    try:  # the package may be installed without its kernels; only the import tells
        from mamba_ssm.ops.selective_scan_interface import selective_scan_fn  # noqa: F401
    except Exception:
        return False
    return True


@overload
def selective_scan(
    u: Tensor,
    delta: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None = ...,
    z: Tensor | None = ...,
    *,
    initial_state: Tensor | None = ...,
    return_last_state: Literal[False] = ...,
    impl: str = ...,
) -> Tensor: ...


@overload
def selective_scan(
    u: Tensor,
    delta: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None = ...,
    z: Tensor | None = ...,
    *,
    initial_state: Tensor | None = ...,
    return_last_state: Literal[True],
    impl: str = ...,
) -> tuple[Tensor, Tensor]: ...


def selective_scan(
    u: Tensor,
    delta: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None = None,
    z: Tensor | None = None,
    *,
    initial_state: Tensor | None = None,
    return_last_state: bool = False,
    impl: str = "auto",
) -> Tensor | tuple[Tensor, Tensor]:
    """Run the recurrence over every row and channel; differentiable in all tensor arguments.

    `u`, `delta` (already positive: softplus is the caller's), `z` are `[B, L, D]`, `A` is `[D, N]`, `B` and
    `C` are `[B, L, N]`, `D` is `[D]`, `initial_state` is `[B, D, N]` (zero when not given). Returns
    y `[B, L, D]` of the type of `u`, with `return_last_state` also the state after the last step `[B, D, N]`,
    in float32 where `u` is smaller.
    Raises `ValueError` for shapes that do not fit and `FindRecError` for an `impl` that cannot work here.
    """
    _check_shapes(u, delta, A, B, C, D, z, initial_state)
    chosen = scan_backend(u.device, impl)
    inputs = (u, delta, A, B, C, D, z, initial_state)
    if chosen == "mamba_ssm" and (problem := _mamba_ssm_problem(inputs, return_last_state)):
        if impl != "auto":
            raise FindRecError(f"scan implementation 'mamba_ssm' {problem}; use 'auto'")
        chosen = "torch"
    last: Tensor | None
    if chosen == "cpp":
        y, last = cpp_scan(u, delta, A, B, C, D, z, initial_state, want_last=return_last_state)
    elif chosen == "mamba_ssm":
        y, last = _mamba_ssm_scan(u, delta, A, B, C, D, z)
    else:
        wide = torch.promote_types(u.dtype, torch.float32)
        if initial_state is None:
            initial_state = u.new_zeros(u.shape[0], u.shape[2], A.shape[1], dtype=wide)
        initial_state = initial_state.to(wide)
        if chosen == "reference":
            u_, delta_, A_, B_, C_ = (x.to(wide) for x in (u, delta, A, B, C))
            y, last = reference_scan(u_, delta_, A_, B_, C_, initial_state)
        else:
            y, last = ChunkedScan.apply(u, delta, A, B, C, initial_state)  # type: ignore[no-untyped-call]
        y = _skip_and_gate(y, u, D, z)
    if not return_last_state:
        return y
    assert last is not None
    return y, last


def selective_scan_step(
    u_BD: Tensor,
    delta_BD: Tensor,
    A_DN: Tensor,
    B_BN: Tensor,
    C_BN: Tensor,
    D: Tensor | None = None,
    z: Tensor | None = None,
    *,
    state_BDN: Tensor,
) -> tuple[Tensor, Tensor]:
    """One step of `selective_scan`: update the state of the events so far with one more event.

    `u_BD`, `delta_BD`, `z` are `[B, D]`, `A_DN` is `[D, N]`, `B_BN` and `C_BN` are `[B, N]`, `D` is `[D]`;
    `state_BDN` `[B, D, N]` is the last state of a scan or of a step, zeros where nothing happened yet; it is
    not changed. Returns y `[B, D]` of the type of `u_BD` and the new state, of the type of the old one.
    Time and memory are O(B D N), whatever the length of the histories. Differentiable; any device.
    Raises `ValueError` for shapes that do not fit.
    """
    b, channels = u_BD.shape
    states = A_DN.shape[-1]
    _check(
        "selective_scan_step",
        delta=(delta_BD, (b, channels)),
        A=(A_DN, (channels, states)),
        B=(B_BN, (b, states)),
        C=(C_BN, (b, states)),
        D=(D, (channels,)),
        z=(z, (b, channels)),
        state=(state_BDN, (b, channels, states)),
    )
    u, delta, A, B, C = (x.to(state_BDN.dtype) for x in (u_BD, delta_BD, A_DN, B_BN, C_BN))
    y_BD, state_BDN = step_states(u, delta, A, B, C, state_BDN)
    return _skip_and_gate(y_BD, u_BD, D, z), state_BDN


def _skip_and_gate(y: Tensor, u: Tensor, D: Tensor | None, z: Tensor | None) -> Tensor:
    """Compute `(y + D u) * silu(z)` in the dtype of y; returns the dtype of u."""
    if D is not None:
        y = y + u.to(y.dtype) * D
    if z is not None:
        y = y * F.silu(z.to(y.dtype))
    return y.to(u.dtype)


def _check_shapes(
    u: Tensor,
    delta: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None,
    z: Tensor | None,
    initial_state: Tensor | None,
) -> None:
    b, length, channels = u.shape
    states = A.shape[-1]
    _check(
        "selective_scan",
        delta=(delta, (b, length, channels)),
        A=(A, (channels, states)),
        B=(B, (b, length, states)),
        C=(C, (b, length, states)),
        D=(D, (channels,)),
        z=(z, (b, length, channels)),
        initial_state=(initial_state, (b, channels, states)),
    )


def _check(where: str, **expected: tuple[Tensor | None, tuple[int, ...]]) -> None:
    for name, (tensor, shape) in expected.items():
        if tensor is not None and tuple(tensor.shape) != shape:
            raise ValueError(f"{where}: {name} has shape {tuple(tensor.shape)}, expected {shape}")


def _mamba_ssm_problem(inputs: tuple[Tensor | None, ...], want_last: bool) -> str | None:
    """Why the package's kernel cannot run this call, or None; its backward pass ignores the last state."""
    u, initial_state = inputs[0], inputs[-1]
    if initial_state is not None:
        return "takes no initial state"
    if u is not None and u.dtype == torch.float64:
        return "knows no float64"
    if want_last and torch.is_grad_enabled() and any(x is not None and x.requires_grad for x in inputs):
        return "gives no gradient through the last state"
    return None


def _mamba_ssm_scan(
    u: Tensor, delta: Tensor, A: Tensor, B: Tensor, C: Tensor, D: Tensor | None, z: Tensor | None
) -> tuple[Tensor, Tensor]:
    """Call mamba-ssm: channels before steps, parameters in float32, one dtype for everything else."""
    from mamba_ssm.ops.selective_scan_interface import selective_scan_fn

    first = (x.to(u.dtype).transpose(1, 2) for x in (u, delta))
    second = (x.to(u.dtype).transpose(1, 2) for x in (B, C))
    gate = None if z is None else z.to(u.dtype).transpose(1, 2)
    y_BDL, last = selective_scan_fn(
        *first, A.float(), *second, None if D is None else D.float(), z=gate, return_last_state=True
    )
    return y_BDL.transpose(1, 2), last
