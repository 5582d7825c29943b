"""Operations on the hyperboloid (Lorentz model of hyperbolic space) that are stable in float32.

A point is `x = (x_0, x_1, ..., x_d)` with `-x_0^2 + x_1^2 + ... + x_d^2 = -1` and `x_0 >= 1` (curvature -1).
The origin is `o = (1, 0, ..., 0)`. A tangent vector at the origin has `v_0 = 0` and is stored without it, so
the maps between tangent vectors and points change the width by one.

The textbook distance `arcosh(-<x, y>_L)` loses all digits of close points, and its gradient is infinite at
`x = y`. Here distances are computed from the hyperbolic law of cosines, written as a sum of positive terms:

    cosh d - 1 = 2 sinh^2((a - b) / 2) + sinh a sinh b |x_s / |x_s| - y_s / |y_s||^2 / 2

with the distances `a`, `b` of x and y from the origin and their spatial parts `x_s`, `y_s`, where
`|x_s| = sinh a`. Formulas of the Lorentz model: Nickel & Kiela 2018 (arXiv 1806.03417).

Shape letters: d width of tangent vectors, D = d + 1 width of points.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

# Points are at most this far from the origin: in float32 sinh and cosh are finite up to 88, and their
# products, which are inner products of points, up to 44.
MAX_RADIUS = 40.0
_SMALL = 1e-2  # below it a series of two or three terms is exact in float32 and better than 1e-11 in float64


def lorentz_inner(x: Tensor, y: Tensor) -> Tensor:
    """`<x, y>_L = -x_0 y_0 + x_1 y_1 + ... + x_d y_d` of points `[..., D]`; `-cosh` of their distance."""
    return (x[..., 1:] * y[..., 1:]).sum(-1) - x[..., 0] * y[..., 0]


def project(space: Tensor) -> Tensor:
    """The points `[..., D]` with the spatial parts `space` `[..., d]`: `x_0 = sqrt(1 + |x_s|^2)`."""
    norm = torch.linalg.vector_norm(space, dim=-1, keepdim=True)
    # hypot does not square large numbers, which would overflow.
    return torch.cat([torch.hypot(norm, torch.ones_like(norm)), space], dim=-1)


def exp_origin(v: Tensor) -> Tensor:
    """The points `[..., D]` reached from the origin along tangent vectors `v` `[..., d]`.

    `exp_o(v) = (cosh |v|, sinh |v| v / |v|)`. Vectors longer than `MAX_RADIUS` are shortened to it; the
    gradient of their direction remains.
    """
    radius = torch.linalg.vector_norm(v, dim=-1, keepdim=True)
    short = v * (MAX_RADIUS / radius.clamp(min=MAX_RADIUS))
    square = short.square().sum(-1, keepdim=True)
    small, near, far = _split(square)
    series = 1 + near / 6 * (1 + near / 20 * (1 + near / 42))
    return project(short * torch.where(small, series, far.sqrt().sinh() / far.sqrt()))


def log_origin(x: Tensor) -> Tensor:
    """The tangent vectors `[..., d]` at the origin that point to `x` `[..., D]`; inverse of `exp_origin`.

    Computed from the spatial part as `arsinh(|x_s|) x_s / |x_s|`, which is exact near the origin, where
    `arcosh(x_0)` is not.
    """
    space = x[..., 1:]
    square = space.square().sum(-1, keepdim=True)
    small, near, far = _split(square)
    series = 1 - near * (1 / 6 - near * (3 / 40 - near * (5 / 112 - near * 35 / 1152)))
    return space * torch.where(small, series, far.sqrt().asinh() / far.sqrt())


def squared_distance(x: Tensor, y: Tensor) -> Tensor:
    """The squared hyperbolic distances `[...]` of points `[..., D]`, which are broadcast.

    The gradient is finite everywhere, also at `x = y`.
    """
    delta = _cosh_distance_minus_one(x, y)
    # arcosh(1 + delta) = 2 arsinh(sqrt(delta / 2)); its square is smooth at 0.
    small, near, far = _split(delta)
    series = near * (2 - near * (1 / 3 - near * (4 / 45 - near * (1 / 35 - near * 16 / 1575))))
    return torch.where(small, series, 4 * (far / 2).sqrt().asinh().square())


def distance(x: Tensor, y: Tensor) -> Tensor:
    """The hyperbolic distances `[...]` of points `[..., D]`; the gradient at `x = y` is infinite."""
    half: Tensor = (_cosh_distance_minus_one(x, y) / 2).sqrt().asinh()
    return 2 * half


def _cosh_distance_minus_one(x: Tensor, y: Tensor) -> Tensor:
    """`cosh d(x, y) - 1 >= 0`, see the docstring of the module."""
    x_space, y_space = x[..., 1:], y[..., 1:]
    x_norm, y_norm = (torch.linalg.vector_norm(space, dim=-1) for space in (x_space, y_space))
    turn = (F.normalize(x_space, dim=-1) - F.normalize(y_space, dim=-1)).square().sum(-1)
    radial = ((x_norm.asinh() - y_norm.asinh()) / 2).sinh().square()
    total: Tensor = 2 * radial + x_norm * y_norm * turn / 2
    return total


def _split(value: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Whether each value is small, the small values, and the others; a harmless value replaces the rest.

    A branch that `torch.where` does not choose still has a gradient, which must be finite.
    """
    small = value < _SMALL
    return small, torch.where(small, value, 0.0), torch.where(small, 1.0, value)
