"""The Mamba block: gated selective state space layer, linear in the length (Gu & Dao 2023, arXiv 2312.00752).

Shape letters: B rows, L steps, d model width, E inner width, N states of a channel, K convolution taps.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from findrec.config import StreamConfig
from findrec.models.layers import Dropout, LayerScale
from findrec.ops.selective_scan import selective_scan

DT_MIN, DT_MAX = 1e-3, 1e-1  # the time steps channels start with, log-uniform (section 3.6)


class _CausalConv(torch.autograd.Function):
    """Depthwise causal convolution over `[B, L, E]` as K shifted multiply-adds.

    `conv1d` with groups wants channels before steps and is several times slower on a CPU.
    """

    @staticmethod
    def forward(ctx: Any, x_BLE: Tensor, taps_EK: Tensor, bias_E: Tensor) -> Tensor:
        ctx.save_for_backward(x_BLE, taps_EK)
        length, taps = x_BLE.shape[1], taps_EK.shape[1]
        taps_KE = taps_EK.t().contiguous()
        y_BLE = torch.addcmul(bias_E, x_BLE, taps_KE[-1])
        for back in range(1, min(taps, length)):
            y_BLE[:, back:].addcmul_(x_BLE[:, :-back], taps_KE[-1 - back])
        return y_BLE

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        x_BLE, taps_EK = ctx.saved_tensors
        dy_BLE = grads[0]
        length, taps = x_BLE.shape[1], taps_EK.shape[1]
        taps_KE = taps_EK.t().contiguous()
        dx_BLE = dy_BLE * taps_KE[-1]
        dtaps_KE = torch.zeros_like(taps_KE)
        dtaps_KE[-1] = (dy_BLE * x_BLE).sum((0, 1))
        for back in range(1, min(taps, length)):
            dx_BLE[:, :-back].addcmul_(dy_BLE[:, back:], taps_KE[-1 - back])
            dtaps_KE[-1 - back] = (dy_BLE[:, back:] * x_BLE[:, :-back]).sum((0, 1))
        return dx_BLE, dtaps_KE.t(), dy_BLE.sum((0, 1))


def causal_conv(x_BLE: Tensor, taps_EK: Tensor, bias_E: Tensor) -> Tensor:
    """`y_l = bias + sum_k taps[:, K - 1 - k] * x_{l - k}`: each channel for itself, causal."""
    y_BLE: Tensor = _CausalConv.apply(x_BLE, taps_EK, bias_E)  # type: ignore[no-untyped-call]
    return y_BLE


class Mamba(nn.Module):
    """One block: project, convolve, scan with input-dependent steps, gate, project back."""

    def __init__(self, dim: int, config: StreamConfig) -> None:
        super().__init__()
        inner, self.num_states = config.expand * dim, config.d_state
        self.dt_rank = math.ceil(dim / 16)
        self.scan = config.scan
        self.in_proj = nn.Linear(dim, 2 * inner, bias=False)
        self.conv_taps = nn.Parameter(torch.empty(inner, config.d_conv))
        self.conv_bias = nn.Parameter(torch.zeros(inner))
        self.x_proj = nn.Linear(inner, self.dt_rank + 2 * self.num_states, bias=False)
        self.dt_proj = nn.Linear(self.dt_rank, inner)
        self.A_log = nn.Parameter(torch.empty(inner, self.num_states))
        self.D = nn.Parameter(torch.ones(inner))
        self.out_proj = nn.Linear(inner, dim, bias=False)
        self._initialise()

    @torch.no_grad()
    def _initialise(self) -> None:
        """The start the paper relies on: A = -(1..N) (S4D-real), time steps log-uniform in [1e-3, 1e-1]."""
        bound = self.conv_taps.shape[1] ** -0.5
        nn.init.uniform_(self.conv_taps, -bound, bound)
        states = torch.arange(1, self.num_states + 1, dtype=torch.float32)
        self.A_log.copy_(states.log().expand_as(self.A_log))
        nn.init.uniform_(self.dt_proj.weight, -(self.dt_rank**-0.5), self.dt_rank**-0.5)
        low, high = math.log(DT_MIN), math.log(DT_MAX)
        dt = torch.empty_like(self.dt_proj.bias).uniform_(low, high).exp()
        self.dt_proj.bias.copy_(dt + torch.log(-torch.expm1(-dt)))  # softplus(bias) = dt

    def forward(self, x_BLd: Tensor) -> Tensor:
        """`[B, L, d]` to `[B, L, d]`, causal."""
        u_BLE, z_BLE = self.in_proj(x_BLd).chunk(2, dim=-1)
        u_BLE = F.silu(causal_conv(u_BLE, self.conv_taps, self.conv_bias))
        parts = [self.dt_rank, self.num_states, self.num_states]
        dt, B_BLN, C_BLN = self.x_proj(u_BLE).split(parts, dim=-1)
        delta_BLE = F.softplus(self.dt_proj(dt))
        A_EN = -torch.exp(self.A_log)
        y_BLE = selective_scan(u_BLE, delta_BLE, A_EN, B_BLN, C_BLN, self.D, z_BLE, impl=self.scan)
        out: Tensor = self.out_proj(y_BLE)
        return out


class MambaStream(nn.Module):
    """Layers of [LayerNorm, Mamba, dropout, LayerScale], each added to its input."""

    def __init__(self, dim: int, dropout: float, config: StreamConfig) -> None:
        super().__init__()
        self.norms = nn.ModuleList([nn.LayerNorm(dim) for _ in range(config.layers)])
        self.blocks = nn.ModuleList([Mamba(dim, config) for _ in range(config.layers)])
        self.scales = nn.ModuleList([LayerScale(dim) for _ in range(config.layers)])
        self.dropout = Dropout(dropout)

    def forward(self, x_BLd: Tensor) -> Tensor:
        """`[B, L, d]` to `[B, L, d]`, causal."""
        for norm, block, scale in zip(self.norms, self.blocks, self.scales, strict=True):
            x_BLd = x_BLd + scale(self.dropout(block(norm(x_BLd))))
        return x_BLd
