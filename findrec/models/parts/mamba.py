"""The Mamba block: gated selective state space layer, linear in the length (Gu & Dao 2023, arXiv 2312.00752).

Training and evaluation process whole histories (`forward`). For serving, `MambaStream.prefill` reads
histories once and `MambaStream.step` appends one event to each, at a cost independent of their length; the
outputs are those of `forward`.

Shape letters: B rows, L steps, d model width, E inner width, N states of a channel, K convolution taps.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from findrec.models.parts.layers import ResidualStream
from findrec.models.parts.stream_config import StreamConfig
from findrec.ops.scan.selective_scan import selective_scan, selective_scan_step

DT_MIN, DT_MAX = 1e-3, 1e-1  # range of the initial time steps, log-uniform (section 3.6)


class _CausalConv(torch.autograd.Function):
    """Depthwise causal convolution over `[B, L, E]` as K shifted multiply-adds.

    A grouped `conv1d` needs channels before steps and is several times slower on a CPU.
    """

    @staticmethod
    def forward(
        ctx: Any, x_BLE: Tensor, taps_EK: Tensor, bias_E: Tensor, dtype: torch.dtype | None
    ) -> Tensor:
        ctx.save_for_backward(x_BLE, taps_EK)
        length, taps = x_BLE.shape[1], taps_EK.shape[1]
        taps_KE = taps_EK.t().contiguous()
        y_BLE = torch.addcmul(bias_E, x_BLE, taps_KE[-1])
        for back in range(1, min(taps, length)):
            y_BLE[:, back:].addcmul_(x_BLE[:, :-back], taps_KE[-1 - back])
        return y_BLE if dtype is None else y_BLE.to(dtype)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, Tensor, Tensor, None]:
        x_BLE, taps_EK = ctx.saved_tensors
        dy_BLE = grads[0].to(torch.promote_types(grads[0].dtype, taps_EK.dtype))
        length, taps = x_BLE.shape[1], taps_EK.shape[1]
        taps_KE = taps_EK.t().contiguous()
        dx_BLE = dy_BLE * taps_KE[-1]
        dtaps_KE = torch.zeros_like(taps_KE)
        dtaps_KE[-1] = (dy_BLE * x_BLE).sum((0, 1))
        for back in range(1, min(taps, length)):
            dx_BLE[:, :-back].addcmul_(dy_BLE[:, back:], taps_KE[-1 - back])
            dtaps_KE[-1 - back] = (dy_BLE[:, back:] * x_BLE[:, :-back]).sum((0, 1))
        return dx_BLE, dtaps_KE.t(), dy_BLE.sum((0, 1)), None


def causal_conv(x_BLE: Tensor, taps_EK: Tensor, bias_E: Tensor, dtype: torch.dtype | None = None) -> Tensor:
    """`y_l = bias + sum_k taps[:, K - 1 - k] * x_{l - k}`: depthwise and causal.

    Summed in the wider of the types of `x_BLE` and the parameters; `dtype` is that of the result, by default
    the same.
    """
    y_BLE: Tensor = _CausalConv.apply(x_BLE, taps_EK, bias_E, dtype)  # type: ignore[no-untyped-call]
    return y_BLE


def _scan_dtype(u_BLE: Tensor) -> torch.dtype | None:
    """The type in which the scan gets its inputs: that of the projections on a GPU, under autocast bfloat16.

    The kernels keep their states in float32 whatever they read, and wider inputs would cost twice the memory
    and its bandwidth. A CPU converts them to float32 anyway, so there they stay as the convolution sums them.
    """
    return None if u_BLE.device.type == "cpu" else u_BLE.dtype


@dataclass(frozen=True)
class MambaState:
    """The recurrent state of one block for each row; zeros before the first event."""

    conv_BKE: Tensor  # [B, K - 1, E]: the convolution's latest inputs, oldest first
    scan_BEN: Tensor  # [B, E, N], at least float32


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
        self.A_log.no_weight_decay = True  # type: ignore[attr-defined]
        self.D = nn.Parameter(torch.ones(inner))
        self.out_proj = nn.Linear(inner, dim, bias=False)
        self._initialise()

    @torch.no_grad()
    def _initialise(self) -> None:
        """Initialisation of the paper: A = -(1..N) (S4D-real), time steps log-uniform in [1e-3, 1e-1]."""
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
        u_BLE = F.silu(causal_conv(u_BLE, self.conv_taps, self.conv_bias, _scan_dtype(u_BLE)))
        delta_BLE, B_BLN, C_BLN = self._select(u_BLE)
        y_BLE = selective_scan(
            u_BLE, delta_BLE, self._decay_rates(), B_BLN, C_BLN, self.D, z_BLE, impl=self.scan
        )
        out: Tensor = self.out_proj(y_BLE)
        return out

    def _select(self, u: Tensor) -> list[Tensor]:
        """Time steps `[..., E]`, and B and C `[..., N]`, of inputs `[..., E]`."""
        dt, B, C = self.x_proj(u).split([self.dt_rank, self.num_states, self.num_states], dim=-1)
        return [F.softplus(self.dt_proj(dt)), B, C]

    def _decay_rates(self) -> Tensor:
        """A `[E, N]`, negative."""
        return -torch.exp(self.A_log)

    def initial_state(self, batch_size: int) -> MambaState:
        """The state of rows without events."""
        inner, taps = self.conv_taps.shape
        wide = torch.promote_types(self.A_log.dtype, torch.float32)
        return MambaState(
            self.conv_taps.new_zeros(batch_size, taps - 1, inner),
            self.A_log.new_zeros(batch_size, inner, self.num_states, dtype=wide),
        )

    def prefill(
        self, x_BLd: Tensor, length_B: Tensor, state: MambaState | None = None
    ) -> tuple[Tensor, MambaState]:
        """`forward` from `state` (None: no events yet), and the state after the last valid event of each row.

        Rows are right-padded: steps from `length_B` on do not change the state; their outputs are undefined.
        """
        tail_BKE = (state or self.initial_state(len(x_BLd))).conv_BKE
        num_tail = tail_BKE.shape[1]
        u_BLE, z_BLE = self.in_proj(x_BLd).chunk(2, dim=-1)
        joined_BLE = torch.cat([tail_BKE, u_BLE], dim=1)
        conv_BLE = causal_conv(joined_BLE, self.conv_taps, self.conv_bias, _scan_dtype(u_BLE))
        u_BLE = F.silu(conv_BLE[:, num_tail:])
        delta_BLE, B_BLN, C_BLN = self._select(u_BLE)
        # A time step of zero leaves the state unchanged: exp(0 A) = 1 and 0 B u = 0.
        steps_L = torch.arange(x_BLd.shape[1], device=x_BLd.device)
        delta_BLE = delta_BLE.masked_fill((steps_L >= length_B[:, None])[..., None], 0.0)
        y_BLE, scan_BEN = selective_scan(
            u_BLE,
            delta_BLE,
            self._decay_rates(),
            B_BLN,
            C_BLN,
            self.D,
            z_BLE,
            initial_state=None if state is None else state.scan_BEN,
            return_last_state=True,
            impl=self.scan,
        )
        # Event l is at index l + num_tail of `joined`, so these are the last inputs before event `length`.
        latest_BK = length_B[:, None] + torch.arange(num_tail, device=x_BLd.device)
        tail_BKE = joined_BLE.gather(1, latest_BK[..., None].expand(-1, -1, joined_BLE.shape[2]))
        return self.out_proj(y_BLE), MambaState(tail_BKE, scan_BEN)

    def step(self, x_Bd: Tensor, state: MambaState) -> tuple[Tensor, MambaState]:
        """Append one event `[B, d]` to `state`: its output `[B, d]`, and the new state."""
        u_BE, z_BE = self.in_proj(x_Bd).chunk(2, dim=-1)
        window_BKE = torch.cat([state.conv_BKE, u_BE[:, None]], dim=1)
        u_BE = F.silu((window_BKE * self.conv_taps.t()).sum(1) + self.conv_bias)
        delta_BE, B_BN, C_BN = self._select(u_BE)
        y_BE, scan_BEN = selective_scan_step(
            u_BE, delta_BE, self._decay_rates(), B_BN, C_BN, self.D, z_BE, state_BDN=state.scan_BEN
        )
        return self.out_proj(y_BE), MambaState(window_BKE[:, 1:], scan_BEN)


class MambaStream(ResidualStream):
    """Residual layers of Mamba blocks."""

    def __init__(self, dim: int, dropout: float, config: StreamConfig) -> None:
        super().__init__(dim, dropout, [Mamba(dim, config) for _ in range(config.layers)])

    def initial_state(self, batch_size: int) -> list[MambaState]:
        """The states of all layers for rows without events."""
        return [self._block(i).initial_state(batch_size) for i in range(len(self.blocks))]

    def prefill(
        self, x_BLd: Tensor, length_B: Tensor, states: list[MambaState] | None = None
    ) -> tuple[Tensor, list[MambaState]]:
        """Read right-padded histories.

        Args:
            x_BLd: inputs `[B, L, d]`.
            length_B: `[B]`, valid events of each row, 0 to L; outputs from there on are undefined.
            states: states that the histories continue; None: no events yet.

        Returns:
            Outputs `[B, L, d]`, equal to those of `forward` up to rounding, and the states of all layers
            after the last valid event of each row.

        Raises:
            ValueError: in training mode, as there is no dropout here, or for invalid lengths.
        """
        self._check_serving("prefill")
        b, length = x_BLd.shape[:2]
        if length_B.shape != (b,) or (b and not 0 <= int(length_B.min()) <= int(length_B.max()) <= length):
            raise ValueError(
                f"MambaStream.prefill: length_B must hold {b} integers from 0 to {length}, the rows and "
                f"steps of x_BLd, but it is {length_B}"
            )
        new_states = []
        for i, (norm, scale) in enumerate(zip(self.norms, self.scales, strict=True)):
            state = None if states is None else states[i]
            y_BLd, state = self._block(i).prefill(norm(x_BLd), length_B, state)
            x_BLd = x_BLd + scale(y_BLd)
            new_states.append(state)
        return x_BLd, new_states

    def step(self, x_Bd: Tensor, states: list[MambaState]) -> tuple[Tensor, list[MambaState]]:
        """Append one event `[B, d]` to each row: its output `[B, d]` and the new states of all layers.

        The cost does not depend on the number of earlier events; `states` is not modified. Outputs are those
        of `forward` over the whole history, up to rounding. Raises `ValueError` in training mode.
        """
        self._check_serving("step")
        new_states = []
        for i, (norm, scale) in enumerate(zip(self.norms, self.scales, strict=True)):
            y_Bd, state = self._block(i).step(norm(x_Bd), states[i])
            x_Bd = x_Bd + scale(y_Bd)
            new_states.append(state)
        return x_Bd, new_states

    def _block(self, i: int) -> Mamba:
        block = self.blocks[i]
        assert isinstance(block, Mamba)
        return block

    def _check_serving(self, what: str) -> None:
        if self.training:
            raise ValueError(f"MambaStream.{what} needs a model in evaluation mode; call .eval() first")
