"""Lorentz operations against textbook formulas in float64, and at extremes against 60 digits."""

from __future__ import annotations

from collections.abc import Callable

import mpmath  # which torch requires
import pytest
import torch
from torch import Tensor

from findrec.ops.lorentz import (
    MAX_RADIUS,
    distance,
    exp_origin,
    log_origin,
    lorentz_inner,
    project,
    squared_distance,
)

TEXTBOOK_TOLERANCE = {torch.float32: 2e-5, torch.float64: 1e-11}


def tangents(count: int, radius: float, dim: int = 6, seed: int = 0) -> Tensor:
    """Tangent vectors of the given length in random directions, float64."""
    v = torch.randn(count, dim, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    return radius * v / v.norm(dim=1, keepdim=True)


def textbook_exp(v: Tensor) -> Tensor:
    radius = v.norm(dim=-1, keepdim=True)
    return torch.cat([radius.cosh(), radius.sinh() * v / radius], dim=-1)


def textbook_distance(x: Tensor, y: Tensor) -> Tensor:
    return torch.arccosh(x[..., 0] * y[..., 0] - (x[..., 1:] * y[..., 1:]).sum(-1))


def exact_distance(u: Tensor, v: Tensor) -> float:
    """The distance of the points at two tangent vectors, in 60 digits."""
    with mpmath.workdps(60):
        left, right = ([mpmath.mpf(value) for value in one.tolist()] for one in (u, v))
        a, b = (mpmath.sqrt(sum(value**2 for value in one)) for one in (left, right))
        product = sum(p * q for p, q in zip(left, right, strict=True))
        cosine = product / (a * b)
        return float(mpmath.acosh(mpmath.cosh(a) * mpmath.cosh(b) - mpmath.sinh(a) * mpmath.sinh(b) * cosine))


@pytest.mark.parametrize("dtype", TEXTBOOK_TOLERANCE)
@pytest.mark.parametrize("radius", [0.3, 1.0, 4.0])
def test_maps_and_distances_are_those_of_the_textbook(dtype: torch.dtype, radius: float) -> None:
    tolerance = TEXTBOOK_TOLERANCE[dtype]
    u, v = tangents(50, radius), tangents(50, 0.7 * radius, seed=1)
    x, y = textbook_exp(u), textbook_exp(v)
    found_x, found_y = exp_origin(u.to(dtype)), exp_origin(v.to(dtype))
    assert found_x.dtype is dtype
    torch.testing.assert_close(found_x.double(), x, rtol=tolerance, atol=tolerance)
    torch.testing.assert_close(log_origin(found_x).double(), u, rtol=tolerance, atol=tolerance)
    want = textbook_distance(x, y)
    torch.testing.assert_close(distance(found_x, found_y).double(), want, rtol=tolerance, atol=0)
    torch.testing.assert_close(squared_distance(found_x, found_y).double(), want**2, rtol=tolerance, atol=0)
    torch.testing.assert_close(lorentz_inner(x, y), -want.cosh(), rtol=1e-12, atol=0)


def test_points_are_on_the_hyperboloid() -> None:
    x = exp_origin(tangents(40, 3.0))
    torch.testing.assert_close(lorentz_inner(x, x), -torch.ones(40, dtype=torch.float64))
    torch.testing.assert_close(project(x[:, 1:]), x)
    origin = exp_origin(torch.zeros(2, 6))
    assert origin.tolist() == [[1.0] + [0.0] * 6] * 2
    assert log_origin(origin).tolist() == [[0.0] * 6] * 2


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("radius", [1e-12, 1e-6, 1e-3, 0.05, 0.0999, 0.1001, 8.0, 30.0])
def test_the_distance_from_the_origin_is_the_length_of_the_tangent_vector(
    dtype: torch.dtype, radius: float
) -> None:
    """`arcosh` of the inner product gives 0 for the small ones, and `cosh` overflows for the large ones."""
    v = tangents(20, radius).to(dtype)
    x, origin = exp_origin(v), exp_origin(torch.zeros_like(v))
    tolerance = 4e-6 if dtype is torch.float32 else 1e-13
    length = v.double().norm(dim=1)
    torch.testing.assert_close(distance(x, origin).double(), length, rtol=tolerance, atol=0)
    torch.testing.assert_close(log_origin(x).double(), v.double(), rtol=tolerance, atol=0)
    if radius**2 > torch.finfo(dtype).tiny:
        torch.testing.assert_close(
            squared_distance(x, origin).double(), length**2, rtol=2 * tolerance, atol=0
        )


@pytest.mark.parametrize("radius", [1e-3, 1.0, 12.0])
@pytest.mark.parametrize("gap", [1e-6, 1e-3, 0.5])
def test_close_points_keep_their_digits_in_float64(radius: float, gap: float) -> None:
    u = tangents(8, radius)
    v = u + gap * radius * tangents(8, 1.0, seed=1)
    found = distance(exp_origin(u), exp_origin(v))
    want = torch.tensor([exact_distance(*pair) for pair in zip(u, v, strict=True)], dtype=torch.float64)
    # Rounding the points to 53 bits alone moves them by radius * 1e-16, times sinh(r) / r sideways.
    torch.testing.assert_close(found, want, rtol=1e-8, atol=0)


def test_far_points_are_finite_and_in_order_in_float32() -> None:
    v = tangents(1, 1.0)
    radii = torch.tensor([[1.0], [10.0], [39.0], [1e3], [1e15]], dtype=torch.float64)
    x = exp_origin((radii * v).float())
    assert x.isfinite().all()
    opposite = exp_origin((-39.0 * v).float())
    apart = distance(x, opposite)
    torch.testing.assert_close(apart[:3], (radii[:3, 0] + 39).float(), rtol=1e-5, atol=0)
    assert apart[3] == apart[4]  # shortened to the largest radius
    torch.testing.assert_close(apart[3], torch.tensor(MAX_RADIUS + 39), rtol=1e-5, atol=0)
    assert lorentz_inner(x, opposite).isfinite().all()


FUNCTIONS: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "exp": lambda u, v: exp_origin(u),
    "log": lambda u, v: log_origin(project(u)),
    "squared distance": lambda u, v: squared_distance(exp_origin(u), exp_origin(v)),
    "distance": lambda u, v: distance(exp_origin(u), exp_origin(v)),
    "inner": lambda u, v: lorentz_inner(exp_origin(u), exp_origin(v)),
}


@pytest.mark.parametrize("name", FUNCTIONS)
@pytest.mark.parametrize("radius", [0.02, 0.0999, 0.8, 3.0])
def test_gradients_are_those_of_finite_differences(name: str, radius: float) -> None:
    u, v = tangents(3, radius).requires_grad_(), tangents(3, 1.1 * radius, seed=1).requires_grad_()
    assert torch.autograd.gradcheck(FUNCTIONS[name], (u, v), eps=1e-6 * radius, atol=1e-5)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_gradients_are_finite_where_the_textbook_has_none(dtype: torch.dtype) -> None:
    """At the origin, at equal points, and beyond the largest radius."""
    for u, v in (
        (torch.zeros(2, 4), torch.zeros(2, 4)),
        (torch.zeros(2, 4), torch.ones(2, 4)),
        (torch.ones(2, 4), torch.ones(2, 4)),
        (torch.ones(2, 4), -torch.ones(2, 4)),
        (1e4 * torch.ones(2, 4), torch.ones(2, 4)),
    ):
        a, b = (one.to(dtype).requires_grad_() for one in (u, v))
        squared_distance(exp_origin(a), exp_origin(b)).sum().backward()
        log_origin(exp_origin(a)).sum().backward()
        for one in (a, b):
            assert one.grad is not None
            assert one.grad.isfinite().all()


def test_the_gradient_of_the_squared_distance_vanishes_only_at_equal_points() -> None:
    """Near equal points it is twice the displacement, as in flat space."""
    u = torch.zeros(1, 3, dtype=torch.float64)
    for length in (1e-9, 1e-6, 1e-3):
        v = torch.tensor([[length, 0, 0]], dtype=torch.float64, requires_grad=True)
        squared_distance(exp_origin(v), exp_origin(u)).sum().backward()
        assert v.grad is not None
        torch.testing.assert_close(v.grad[0, 0], torch.tensor(2 * length).double(), rtol=1e-6, atol=0)


def test_ranking_by_the_inner_product_is_ranking_by_distance() -> None:
    user, items = exp_origin(tangents(1, 0.8)), exp_origin(tangents(300, 1.0, seed=2) * torch.rand(300, 1))
    by_product = lorentz_inner(user, items).argsort(descending=True)
    assert torch.equal(by_product, distance(user, items).argsort())
