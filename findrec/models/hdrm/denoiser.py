"""The network that estimates a vector from its noised form, the noise level and the history.

Shape letters: n vectors, d width, h hidden width.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn
from torch.nn import functional as F

_FREQUENCIES = 16


class Denoiser(nn.Module):
    """Two hidden layers, whose normalised activations are scaled and shifted by the noise level."""

    def __init__(self, width: int, hidden: int, steps: int) -> None:
        """`width` is d; `steps` is the number T of noise levels."""
        super().__init__()
        self.steps = steps
        self.no_history = nn.Parameter(torch.zeros(width))  # replaces the condition
        self.enter = nn.Linear(2 * width, hidden)
        self.middle = nn.Linear(hidden, hidden)
        self.leave = nn.Linear(hidden, width)
        self.direct = nn.Linear(2 * width, width)
        self.level = nn.Sequential(
            nn.Linear(2 * _FREQUENCIES, hidden), nn.SiLU(), nn.Linear(hidden, 4 * hidden)
        )

    def forward(self, x_nd: Tensor, step_n: Tensor, history_nd: Tensor, has_history_n: Tensor) -> Tensor:
        """Estimates of `x_0` `[n, d]`.

        Args:
            x_nd: vectors at the noise level of their step.
            step_n: steps 1..T.
            history_nd: the condition, used where `has_history_n` is true.
            has_history_n: bool.
        """
        condition_nd = torch.where(has_history_n[:, None], history_nd, self.no_history)
        given_n2d = torch.cat([x_nd, condition_nd], dim=1)
        first_n2h, second_n2h = self.level(self._embedding(step_n)).chunk(2, dim=1)
        h_nh = _modulated(self.enter(given_n2d), first_n2h)
        h_nh = h_nh + _modulated(self.middle(h_nh), second_n2h)
        result: Tensor = self.direct(given_n2d) + self.leave(h_nh)
        return result

    def _embedding(self, step_n: Tensor) -> Tensor:
        """Sines and cosines `[n, 2 F]` of the share of the steps, with periods from 4 down to 4 / 64."""
        weight = self.no_history
        exponent_F = torch.linspace(0, math.log(64), _FREQUENCIES, device=weight.device, dtype=weight.dtype)
        angle_nF = step_n[:, None] / self.steps * exponent_F.exp() * (math.pi / 2)
        return torch.cat([angle_nF.sin(), angle_nF.cos()], dim=1)


def _modulated(x_nh: Tensor, level_n2h: Tensor) -> Tensor:
    scale_nh, shift_nh = level_n2h.chunk(2, dim=1)
    return F.silu(F.layer_norm(x_nh, x_nh.shape[1:]) * (1 + scale_nh) + shift_nh)
