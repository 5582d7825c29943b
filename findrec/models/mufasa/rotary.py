"""Rotary position embeddings (Su et al. 2021, arXiv 2104.09864).

Shape letters: B rows, L steps, H heads, h width of a head.
"""

from __future__ import annotations

import torch
from torch import Tensor

_BASE = 10_000.0


def rotate(x_BLHh: Tensor, position: Tensor) -> Tensor:
    """Rotate pairs of elements (j, j + h/2) by angles that grow with the position `[L]` or `[B, L]`.

    Inner products of rotated queries and keys depend on the difference of their positions only. h is even.
    """
    half = x_BLHh.shape[-1] // 2
    frequency = _BASE ** (-torch.arange(half, dtype=torch.float32, device=x_BLHh.device) / half)
    angle = position[..., None, None].float() * frequency  # [(B,) L, 1, h/2]
    cos, sin = angle.cos().to(x_BLHh.dtype), angle.sin().to(x_BLHh.dtype)
    a, b = x_BLHh[..., :half], x_BLHh[..., half:]
    return torch.cat([a * cos - b * sin, a * sin + b * cos], dim=-1)
