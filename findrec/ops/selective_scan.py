"""Selective scan of Mamba-1: a linear recurrence with coefficients from the input (arXiv 2312.00752, alg. 2).

    h_l = exp(delta_l A) h_{l-1} + delta_l B_l u_l          y_l = C_l h_l + D u_l,   then   y_l * silu(z_l)

Tensors are `[B, L, D]` (channels last). No implementation but `reference` stores a state for every step:
states are kept at chunk borders and recomputed in the backward pass, so memory is O(B L D).

| impl        | where             | what                                                                  |
|-------------|-------------------|-----------------------------------------------------------------------|
| `reference` | anywhere          | plain loop under autograd, any dtype: what the others are tested with |
| `torch`     | anywhere          | chunks of whole-tensor operations, hand-written backward              |
| `cpp`       | CPU, needs g++    | one fused kernel for each direction, built at first use               |
| `mamba_ssm` | CUDA              | the kernel of the mamba-ssm package                                   |

All are bit-deterministic on CPU for a fixed number of threads (`cpp` for any number).
Shape letters: B rows, L steps, D channels, N states of a channel, S steps of a chunk.
"""

from __future__ import annotations

import importlib.util
from functools import cache
from typing import Any, Literal, overload

import torch
from torch import Tensor
from torch.nn import functional as F

from findrec.errors import FindRecError
from findrec.ops._scan_cpp import cpp_scan, cpp_scan_problem
from findrec.progress import say

CHUNK = 16  # steps the torch implementation holds states for at once
IMPLS = ("auto", "reference", "torch", "cpp", "mamba_ssm")


def scan_backend(device: torch.device | str, impl: str = "auto") -> str:
    """The implementation that `impl` means on a device, for the log. May build the CPU kernel.

    Raises `FindRecError` when `impl` is unknown or is asked for by name and cannot work here.
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
            "package mamba-ssm with its CUDA kernels (pip install findrec[gpu]); 'auto' picks what works"
        )
    return impl


@cache
def _best(kind: str) -> str:
    """What `auto` means; says so loudly, once, when that is not the fast one."""
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
    say(
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
    try:  # the package installs without its kernels too; only the import shows
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
    y `[B, L, D]`, with `return_last_state` also the state after the last step `[B, D, N]`.
    Raises `ValueError` for shapes that do not fit and `FindRecError` for an `impl` that cannot work here.
    """
    _check_shapes(u, delta, A, B, C, D, z, initial_state)
    chosen = scan_backend(u.device, impl)
    if chosen == "mamba_ssm" and initial_state is not None:
        if impl != "auto":
            raise FindRecError("scan implementation 'mamba_ssm' takes no initial state; use 'auto'")
        chosen = "torch"
    if chosen == "cpp" and u.dtype not in (torch.float32, torch.float64):
        if impl != "auto":
            raise FindRecError(f"scan implementation 'cpp' knows float32 and float64, not {u.dtype}")
        chosen = "torch"
    if chosen == "cpp":
        y, last = cpp_scan(u, delta, A, B, C, D, z, initial_state)
    elif chosen == "mamba_ssm":
        y, last = _mamba_ssm_scan(u, delta, A, B, C, D, z)
    else:
        if initial_state is None:
            initial_state = u.new_zeros(u.shape[0], u.shape[2], A.shape[1])
        run = _reference_scan if chosen == "reference" else _ChunkedScan.apply
        y, last = run(u, delta, A, B, C, initial_state)
        if D is not None:
            y = y + u * D
        if z is not None:
            y = y * F.silu(z)
    return (y, last) if return_last_state else y


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
    expected = {
        "delta": (delta, (b, length, channels)),
        "A": (A, (channels, states)),
        "B": (B, (b, length, states)),
        "C": (C, (b, length, states)),
        "D": (D, (channels,)),
        "z": (z, (b, length, channels)),
        "initial_state": (initial_state, (b, channels, states)),
    }
    for name, (tensor, shape) in expected.items():
        if tensor is not None and tuple(tensor.shape) != shape:
            raise ValueError(f"selective_scan: {name} has shape {tuple(tensor.shape)}, expected {shape}")


def _reference_scan(
    u: Tensor, delta: Tensor, A: Tensor, B: Tensor, C: Tensor, state: Tensor
) -> tuple[Tensor, Tensor]:
    """The two equations, one step after the other."""
    outputs = []
    steps = zip(u.unbind(1), delta.unbind(1), B.unbind(1), C.unbind(1), strict=True)
    for u_BD, delta_BD, B_BN, C_BN in steps:
        decay_BDN = torch.exp(delta_BD[..., None] * A)
        state = decay_BDN * state + (delta_BD * u_BD)[..., None] * B_BN[:, None]
        outputs.append((state * C_BN[:, None]).sum(-1))
    return torch.stack(outputs, dim=1), state


class _ChunkedScan(torch.autograd.Function):
    """Time-major chunks: only the recurrence itself is a loop, all else is whole-chunk operations."""

    @staticmethod
    def forward(
        ctx: Any, u: Tensor, delta: Tensor, A: Tensor, B: Tensor, C: Tensor, initial_state: Tensor
    ) -> tuple[Tensor, Tensor]:
        u_LBD, delta_LBD, B_LBN, C_LBN = (x.transpose(0, 1).contiguous() for x in (u, delta, B, C))
        A_ND = A.t().contiguous()
        y_LBD = torch.empty_like(u_LBD)
        state_BND = initial_state.transpose(1, 2).contiguous()
        borders = []
        for lo in range(0, len(u_LBD), CHUNK):
            s = slice(lo, lo + CHUNK)
            borders.append(state_BND)
            _, states_SBND = _chunk_states(u_LBD[s], delta_LBD[s], A_ND, B_LBN[s], state_BND)
            y_LBD[s] = (C_LBN[s].unsqueeze(2) @ states_SBND).squeeze(2)
            state_BND = states_SBND[-1].clone()
        ctx.save_for_backward(u_LBD, delta_LBD, A_ND, B_LBN, C_LBN, torch.stack(borders))
        return y_LBD.transpose(0, 1).contiguous(), state_BND.transpose(1, 2).contiguous()

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, ...]:
        u_LBD, delta_LBD, A_ND, B_LBN, C_LBN, borders = ctx.saved_tensors
        dy_LBD = grads[0].transpose(0, 1).contiguous()
        carry_BND = grads[1].transpose(1, 2).contiguous()
        du_LBD, ddelta_LBD = torch.empty_like(u_LBD), torch.empty_like(u_LBD)
        dB_LBN, dC_LBN, dA_ND = torch.empty_like(B_LBN), torch.empty_like(B_LBN), torch.zeros_like(A_ND)
        for chunk in reversed(range(len(borders))):
            s = slice(chunk * CHUNK, (chunk + 1) * CHUNK)
            u, delta, dy = u_LBD[s], delta_LBD[s], dy_LBD[s]
            decay, states = _chunk_states(u, delta, A_ND, B_LBN[s], borders[chunk])
            dC_LBN[s] = (states @ dy.unsqueeze(3)).squeeze(3)
            # g is the gradient of each state: from its own output, and from the next state.
            g = C_LBN[s].unsqueeze(3) * dy.unsqueeze(2)
            for g_BND, decay_BND in zip(reversed(g.unbind(0)), reversed(decay.unbind(0)), strict=True):
                g_BND.add_(carry_BND)
                carry_BND = g_BND * decay_BND
            from_input = (B_LBN[s].unsqueeze(2) @ g).squeeze(2)  # gradient of delta * u
            dB_LBN[s] = (g @ (delta * u).unsqueeze(3)).squeeze(3)
            before = torch.cat([borders[chunk][None], states[:-1]])
            exponent = g.mul_(decay).mul_(before)  # gradient of delta * A
            ddelta_LBD[s] = (exponent * A_ND).sum(2).addcmul_(from_input, u)
            dA_ND += (exponent * delta.unsqueeze(2)).sum((0, 1))
            du_LBD[s] = from_input * delta
        du, ddelta, dB, dC = (x.transpose(0, 1) for x in (du_LBD, ddelta_LBD, dB_LBN, dC_LBN))
        return du, ddelta, dA_ND.t(), dB, dC, carry_BND.transpose(1, 2)


def _chunk_states(
    u_SBD: Tensor, delta_SBD: Tensor, A_ND: Tensor, B_SBN: Tensor, state_BND: Tensor
) -> tuple[Tensor, Tensor]:
    """Decays and states `[S, B, N, D]` of a chunk that starts from `state_BND`."""
    decay = (delta_SBD.unsqueeze(2) * A_ND).exp_()
    states = (delta_SBD * u_SBD).unsqueeze(2) * B_SBN.unsqueeze(3)
    for now_BND, decay_BND in zip(states.unbind(0), decay.unbind(0), strict=True):
        state_BND = now_BND.addcmul_(decay_BND, state_BND)
    return decay, states


def _mamba_ssm_scan(
    u: Tensor, delta: Tensor, A: Tensor, B: Tensor, C: Tensor, D: Tensor | None, z: Tensor | None
) -> tuple[Tensor, Tensor]:
    """mamba-ssm wants channels before steps and float32 parameters."""
    from mamba_ssm.ops.selective_scan_interface import selective_scan_fn

    first = (x.transpose(1, 2) for x in (u, delta))
    second = (x.transpose(1, 2) for x in (B, C))
    gate = None if z is None else z.transpose(1, 2)
    y_BDL, last = selective_scan_fn(
        *first, A.float(), *second, None if D is None else D.float(), z=gate, return_last_state=True
    )
    return y_BDL.transpose(1, 2), last
