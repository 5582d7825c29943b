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
| `triton`    | CUDA              | one fused kernel for each direction, compiled by triton at first use  |
| `mamba_ssm` | CUDA              | the kernels of the mamba-ssm package                                  |

`auto` takes `cpp` on a CPU; on CUDA `mamba_ssm` for calls that it can run (no initial state, no float64, no
gradient of the last state), else `triton`; and `torch` where these do not work, with a warning.
All are deterministic on CPU for a fixed number of threads (`cpp` for any number), `triton` on CUDA; the
gradients of `mamba_ssm` depend on the order of its threads: `torch.use_deterministic_algorithms` excludes it.
States are accumulated in at least float32, also for bfloat16 tensors and under autocast.
Shape letters: B rows, L steps, D channels, N states of a channel.
"""

from __future__ import annotations

from functools import cache
from typing import Literal, overload

import torch
from torch import Tensor
from torch.nn import functional as F

from findrec.errors import FindRecError
from findrec.ops.scan._scan_cpp import cpp_scan, cpp_scan_problem
from findrec.ops.scan._scan_mamba import mamba_call_problem, mamba_problem, mamba_scan
from findrec.ops.scan._scan_torch import ChunkedScan, full_precision, reference_scan, step_states
from findrec.ops.scan._scan_triton import triton_call_problem, triton_problem, triton_scan
from findrec.progress import warn

ScanInputs = tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor | None, Tensor | None, Tensor | None]
IMPLS = ("auto", "reference", "torch", "cpp", "triton", "mamba_ssm")


def scan_backend(device: torch.device | str, impl: str = "auto") -> str:
    """The implementation that `impl` selects on a device. May build kernels, and try them on a small scan.

    Raises `FindRecError` when `impl` is unknown or unavailable.
    """
    kind = torch.device(device).type
    if impl not in IMPLS:
        raise FindRecError(f"scan implementation {impl!r} is unknown: choose one of {', '.join(IMPLS)}")
    if impl == "auto":
        return _best(kind)
    problem = None
    if impl == "cpp":
        problem = "it runs on the CPU only" if kind != "cpu" else cpp_scan_problem()
    elif impl == "triton":
        problem = triton_problem(kind)
    elif impl == "mamba_ssm":
        problem = mamba_problem(kind)
    if problem is not None:
        raise FindRecError(f"scan implementation {impl!r} cannot be used on {kind}: {problem}; try 'auto'")
    return impl


@cache
def _best(kind: str) -> str:
    """The implementation that `auto` selects; warns once when it is not a fast one."""
    if kind == "cuda":
        problem = mamba_problem(kind)
        return "mamba_ssm" if problem is None else _triton_or_torch(kind, f"mamba_ssm: {problem}; ")
    problem = cpp_scan_problem() if kind == "cpu" else f"there is no kernel for {kind}"
    return "cpp" if problem is None else _torch_because(problem)


@cache
def _triton_or_torch(kind: str, other_problem: str) -> str:
    """What `auto` selects on CUDA without mamba-ssm; warns once when it is not a fast one."""
    problem = triton_problem(kind)
    return "triton" if problem is None else _torch_because(f"{other_problem}triton: {problem}")


@cache
def _torch_because(reason: str) -> str:
    warn(
        "!"
        * 80
        + f"\nSelective scan: {reason}.\nUsing the slower torch implementation; results are the same "
        "up to rounding, training takes several times longer.\n" + "!" * 80
    )
    return "torch"


def _choose(inputs: ScanInputs, want_last: bool, impl: str) -> str:
    """The implementation that runs a call: that of `scan_backend`, or another if it cannot run this one."""
    u, A = inputs[0], inputs[2]
    chosen = scan_backend(u.device, impl)
    if chosen == "mamba_ssm" and (problem := mamba_call_problem(inputs, want_last)):
        if impl != "auto":
            raise FindRecError(f"scan implementation 'mamba_ssm' {problem}; use 'auto'")
        chosen = _triton_or_torch(u.device.type, f"mamba_ssm {problem}; ")
    if chosen == "triton" and (problem := triton_call_problem(A)):
        if impl != "auto":
            raise FindRecError(f"scan implementation 'triton' {problem}; use 'auto'")
        chosen = _torch_because(f"triton {problem}")
    return chosen


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
    inputs = (u, delta, A, B, C, D, z, initial_state)
    chosen = _choose(inputs, return_last_state, impl)
    with full_precision(u.device):
        y, last = _run(chosen, inputs, return_last_state)
    if not return_last_state:
        return y
    assert last is not None
    return y, last


def _run(chosen: str, inputs: ScanInputs, want_last: bool) -> tuple[Tensor, Tensor | None]:
    u, delta, A, B, C, D, z, initial_state = inputs
    if chosen == "cpp":
        return cpp_scan(*inputs, want_last=want_last)
    if chosen == "triton":
        return triton_scan(*inputs, want_last=want_last)
    if chosen == "mamba_ssm":
        return mamba_scan(u, delta, A, B, C, D, z)
    wide = torch.promote_types(u.dtype, torch.float32)
    if initial_state is None:
        initial_state = u.new_zeros(u.shape[0], u.shape[2], A.shape[1], dtype=wide)
    initial_state = initial_state.to(wide)
    if chosen == "reference":
        u_, delta_, A_, B_, C_ = (x.to(wide) for x in (u, delta, A, B, C))
        y, last = reference_scan(u_, delta_, A_, B_, C_, initial_state)
    else:
        y, last = ChunkedScan.apply(u, delta, A, B, C, initial_state)  # type: ignore[no-untyped-call]
    return _skip_and_gate(y, u, D, z), last


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
