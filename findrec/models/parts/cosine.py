"""Scores that are cosines divided by a temperature. Shape letters: n items, T target positions, d width."""

from __future__ import annotations

import torch
from torch import Tensor, nn

# Added in quadrature to lengths that vectors are divided by: rows of items without events are zero, and the
# gradient there must stay finite. A twentieth of the length of initial rows.
LENGTH_FLOOR = 0.01


def unit_vectors(x_nd: Tensor) -> Tensor:
    """`x / sqrt(|x|^2 + 0.01^2)`: of length 1, except for rows near zero."""
    return x_nd * torch.rsqrt(x_nd.square().sum(-1, keepdim=True) + LENGTH_FLOOR**2)


class CosineQueries(nn.Module):
    """User vectors whose inner products with unit vectors are cosines divided by a temperature."""

    def __init__(self, temperature: float) -> None:
        super().__init__()
        self.temperature = temperature

    def forward(self, h_Td: Tensor) -> Tensor:
        """`[T, d]` to `[T, d]`."""
        return unit_vectors(h_Td.float()) / self.temperature
