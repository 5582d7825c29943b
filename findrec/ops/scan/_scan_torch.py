"""Selective scan in plain torch: a loop over steps, and a chunked version with a hand-written backward pass.

Letters as in `findrec/ops/scan/selective_scan.py`; S steps of a chunk.
"""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

CHUNK = 16  # steps whose states are stored at the same time


def full_precision(device: torch.device) -> AbstractContextManager[Any]:
    """Switch autocast off, which would round the states in matrix products to bfloat16."""
    if torch.amp.is_autocast_available(device.type):
        return torch.autocast(device.type, enabled=False)
    return nullcontext()


def step_states(
    u_BD: Tensor, delta_BD: Tensor, A_DN: Tensor, B_BN: Tensor, C_BN: Tensor, state_BDN: Tensor
) -> tuple[Tensor, Tensor]:
    """The two equations at one step: `C h [B, D]`, without skip and gate, and the new state h `[B, D, N]`."""
    decay_BDN = torch.exp(delta_BD[..., None] * A_DN)
    state_BDN = decay_BDN * state_BDN + (delta_BD * u_BD)[..., None] * B_BN[:, None]
    return (state_BDN * C_BN[:, None]).sum(-1), state_BDN


def reference_scan(
    u: Tensor, delta: Tensor, A: Tensor, B: Tensor, C: Tensor, state: Tensor
) -> tuple[Tensor, Tensor]:
    """Sequential loop under autograd; returns `C h [B, L, D]` and the last state."""
    outputs = []
    for u_BD, delta_BD, B_BN, C_BN in zip(*(x.unbind(1) for x in (u, delta, B, C)), strict=True):
        y_BD, state = step_states(u_BD, delta_BD, A, B_BN, C_BN, state)
        outputs.append(y_BD)
    return torch.stack(outputs, dim=1), state


class ChunkedScan(torch.autograd.Function):
    """Time-major chunks: only the recurrence is a loop, everything else operates on full chunks.

    States and sums are at least float32, also for bfloat16 tensors.
    """

    @staticmethod
    def forward(
        ctx: Any, u: Tensor, delta: Tensor, A: Tensor, B: Tensor, C: Tensor, initial_state: Tensor
    ) -> tuple[Tensor, Tensor]:
        wide = initial_state.dtype
        inputs = [x.transpose(0, 1) for x in (u, delta, B, C)]
        A_ND = A.t().to(wide).contiguous()
        y_BLD = torch.empty_like(u, dtype=wide)
        state_BND = initial_state.transpose(1, 2).contiguous()
        borders = []
        for lo in range(0, u.shape[1], CHUNK):
            u_SBD, delta_SBD, B_SBN, C_SBN = _cut(inputs, lo, wide)
            borders.append(state_BND)
            _, states_SBND = _chunk_states(u_SBD, delta_SBD, A_ND, B_SBN, state_BND)
            y_BLD[:, lo : lo + CHUNK] = (C_SBN.unsqueeze(2) @ states_SBND).squeeze(2).transpose(0, 1)
            state_BND = states_SBND[-1].clone()
        ctx.save_for_backward(u, delta, A, B, C, torch.stack(borders))
        return y_BLD, state_BND.transpose(1, 2).contiguous()

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy_BLD: Tensor, dlast_BDN: Tensor) -> tuple[Tensor, ...]:
        with full_precision(dy_BLD.device):  # backward passes may be called under autocast
            return _gradients(ctx.saved_tensors, dy_BLD, dlast_BDN)


def _gradients(saved: tuple[Tensor, ...], dy_BLD: Tensor, dlast_BDN: Tensor) -> tuple[Tensor, ...]:
    u, delta, A, B, C, borders = saved
    wide = borders.dtype
    inputs = [x.transpose(0, 1) for x in (u, delta, B, C, dy_BLD)]
    A_ND = A.t().to(wide).contiguous()
    carry_BND = dlast_BDN.transpose(1, 2).contiguous()
    du, ddelta, dB, dC = (torch.empty_like(x) for x in (u, delta, B, C))
    dA_ND = torch.zeros_like(A_ND)
    for chunk in reversed(range(len(borders))):
        lo = chunk * CHUNK
        to = slice(lo, lo + CHUNK)
        u_SBD, delta_SBD, B_SBN, C_SBN, dy_SBD = _cut(inputs, lo, wide)
        decay, states = _chunk_states(u_SBD, delta_SBD, A_ND, B_SBN, borders[chunk])
        dC[:, to] = (states @ dy_SBD.unsqueeze(3)).squeeze(3).transpose(0, 1)
        # g is the gradient of each state: from its own output, and from the next state.
        g = C_SBN.unsqueeze(3) * dy_SBD.unsqueeze(2)
        for g_BND, decay_BND in zip(reversed(g.unbind(0)), reversed(decay.unbind(0)), strict=True):
            g_BND.add_(carry_BND)
            carry_BND = g_BND * decay_BND
        from_input = (B_SBN.unsqueeze(2) @ g).squeeze(2)  # gradient of delta * u
        dB[:, to] = (g @ (delta_SBD * u_SBD).unsqueeze(3)).squeeze(3).transpose(0, 1)
        before = torch.cat([borders[chunk][None], states[:-1]])
        exponent = g.mul_(decay).mul_(before)  # gradient of delta * A
        ddelta[:, to] = (exponent * A_ND).sum(2).addcmul_(from_input, u_SBD).transpose(0, 1)
        dA_ND += (exponent * delta_SBD.unsqueeze(2)).sum((0, 1))
        du[:, to] = (from_input * delta_SBD).transpose(0, 1)
    return du, ddelta, dA_ND.t().to(A.dtype), dB, dC, carry_BND.transpose(1, 2)


def _cut(inputs_LB: list[Tensor], lo: int, dtype: torch.dtype) -> list[Tensor]:
    """Contiguous time-major copies of one chunk of each input."""
    return [x[lo : lo + CHUNK].to(dtype).contiguous() for x in inputs_LB]


def _chunk_states(
    u_SBD: Tensor, delta_SBD: Tensor, A_ND: Tensor, B_SBN: Tensor, state_BND: Tensor
) -> tuple[Tensor, Tensor]:
    """Decays and states `[S, B, N, D]` of a chunk that starts from `state_BND`."""
    decay = (delta_SBD.unsqueeze(2) * A_ND).exp_()
    states = (delta_SBD * u_SBD).unsqueeze(2) * B_SBN.unsqueeze(3)
    for now_BND, decay_BND in zip(states.unbind(0), decay.unbind(0), strict=True):
        state_BND = now_BND.addcmul_(decay_BND, state_BND)
    return decay, states
