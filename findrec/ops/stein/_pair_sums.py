"""Kernel sums over all pairs of rows, with gradients: one pass over row tiles, no n x n buffer.

Rows come in units of the bandwidth (r2 = |x - y|^2 needs no h). The gradient is computed together
with the values of a tile, so the backward pass only scales it; memory is a few tiles and the rows.

With P = s.s', C = (x - y).(s - s'), D the width, a = du/dP, b = du/dC, c = du/dr2, the Langevin-Stein kernel
of `stein_discrepancy` is

    RBF:  k = exp(-r2/2)                 u = k (P + C + D - r2)               a = b = k    c = -u/2 - k
    IMQ:  p = 1/(1 + r2), k = sqrt(p)    u = k (P + p (C + D - 3 + 3p))       a = k        b = k p
          c = -b/2 (P + 3p (C + D - 3 + 5p))

and the sum over ordered pairs of different rows has, all these matrices being symmetric, the gradient

    d/ds_i = 2 sum_j a_ij s_j + b_ij (x_i - x_j)        d/dx_i = 2 sum_j b_ij (s_i - s_j) + 2 c_ij (x_i - x_j)

Shape letters: n and m rows of the samples, D width, t rows of a tile, w columns of a tile.
"""

from __future__ import annotations

from typing import Any, TypeAlias

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from findrec.ops._tiles import tile_bytes

TILE_ELEMENTS = 2**20  # pairs per tile on a CPU: five such buffers, for any number of rows

Slopes: TypeAlias = tuple[Tensor, Tensor, Tensor]  # a, b, -c


def langevin_sum(X_nD: Tensor, S_nD: Tensor, kernel: str) -> Tensor:
    """`sum_{i != j} u(x_i, x_j)`, scores `S_nD` and kernel "rbf" or "imq"; differentiable once, in both."""
    total: Tensor = _LangevinSum.apply(X_nD, S_nD, kernel)  # type: ignore[no-untyped-call]
    return total


def rbf_sum(X_nD: Tensor, Y_mD: Tensor) -> Tensor:
    """`sum_ij exp(-|x_i - y_j|^2 / 2)`; differentiable once, in both."""
    total: Tensor = _RbfSum.apply(X_nD, Y_mD)  # type: ignore[no-untyped-call]
    return total


class _LangevinSum(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, X_nD: Tensor, S_nD: Tensor, kernel: str) -> Tensor:
        n, width = X_nD.shape
        slopes_wanted = any(ctx.needs_input_grad)
        ones_n1 = X_nD.new_ones(n, 1)
        square_n1 = X_nD.square().sum(1, keepdim=True)
        own_n1 = (X_nD * S_nD).sum(1, keepdim=True)
        # Columns of ones fold the terms that depend on one row alone, and the row sums, into the products.
        r2_left, r2_right = (
            torch.cat([-2 * X_nD, square_n1, ones_n1], 1),
            torch.cat([X_nD, ones_n1, square_n1], 1),
        )
        C_left = torch.cat([-X_nD, -S_nD, own_n1 + width, ones_n1], 1)  # the kernel's D comes along
        C_right = torch.cat([S_nD, X_nD, ones_n1, own_n1], 1)
        SX1 = C_right[:, :-1]
        grad_SX = torch.zeros_like(C_right[:, :-2])
        total = X_nD.new_zeros(())
        height = max(1, tile_bytes(X_nD.device, 4 * TILE_ELEMENTS) // (4 * n))
        for start in range(0, n, height):
            # Columns from the tile on: its own square holds both orders of a pair, what is right of it one.
            stop = min(start + height, n)
            rows, columns, later = slice(start, stop), slice(start, n), slice(stop, n)
            r2_tw = (r2_left[rows] @ r2_right[columns].t()).clamp_(min=0)
            P_tw = S_nD[rows] @ S_nD[columns].t()
            C_tw = C_left[rows] @ C_right[columns].t()
            u_tw, slopes = (_rbf if kernel == "rbf" else _imq)(r2_tw, P_tw, C_tw)
            u_tw.diagonal().zero_()
            total += 2 * u_tw.sum() - u_tw[:, : stop - start].sum()
            if slopes_wanted:
                slopes[0].diagonal().zero_()  # b and c meet x_i - x_i = 0 there
                _add_slopes(grad_SX, SX1, rows, columns, slopes)
                if stop < n:
                    a, b, c = (x[:, stop - start :].t() for x in slopes)
                    _add_slopes(grad_SX, SX1, later, rows, (a, b, c))
        ctx.save_for_backward(grad_SX)
        return total

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor, None]:
        (grad_SX,) = ctx.saved_tensors
        grad_S, grad_X = (2 * grad * grad_SX).chunk(2, dim=1)
        return grad_X, grad_S, None


def _rbf(r2: Tensor, P: Tensor, C: Tensor) -> tuple[Tensor, Slopes]:
    """Return u and its slopes from r2, P and C + D, overwritten as new buffers cost more than the sums."""
    w = P.add_(C).sub_(r2)
    k = r2.mul_(-0.5).exp_()
    u = w.mul_(k)
    return u, (k, k, torch.add(k, u, alpha=0.5))


def _imq(r2: Tensor, P: Tensor, C: Tensor) -> tuple[Tensor, Slopes]:
    p = r2.add_(1).reciprocal_()
    k = p.sqrt()
    b = k * p
    C.sub_(3)
    u = torch.add(C, p, alpha=3).mul_(p).add_(P).mul_(k)
    fall = P.addcmul_(C.add_(p, alpha=5), p, value=3).mul_(b).mul_(0.5)
    return u, (k, b, fall)


def _add_slopes(grad_SX: Tensor, SX1: Tensor, rows: slice, columns: slice, slopes: Slopes) -> None:
    """Add the contribution of pairs of `rows` with `columns` to `grad_SX[rows]`: half the gradient above."""
    a, b, fall = slopes
    width = grad_SX.shape[1] // 2
    from_b, from_fall = b @ SX1[columns], fall @ SX1[columns, width:]
    apart = from_b[:, -1:] * SX1[rows, :-1] - from_b[:, :-1]
    near = from_fall[:, :-1] - from_fall[:, -1:] * SX1[rows, width:-1]
    grad_SX[rows, :width] += apart[:, width:] + a @ SX1[columns, :width]
    grad_SX[rows, width:] += apart[:, :width] + 2 * near


class _RbfSum(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, X_nD: Tensor, Y_mD: Tensor) -> Tensor:
        wanted_X, wanted_Y = ctx.needs_input_grad
        grad_X, grad_Y = torch.zeros_like(X_nD), torch.zeros_like(Y_mD)
        square_n, square_m = X_nD.square().sum(1), Y_mD.square().sum(1)
        total = X_nD.new_zeros(())
        height = max(1, tile_bytes(X_nD.device, 4 * TILE_ELEMENTS) // (4 * max(1, len(Y_mD))))
        for start in range(0, len(X_nD), height):
            rows = slice(start, start + height)
            k_tm = torch.addmm(square_m, X_nD[rows], Y_mD.t(), alpha=-2)
            k_tm.add_(square_n[rows, None]).clamp_(min=0).mul_(-0.5).exp_()
            total += k_tm.sum()
            if wanted_X:
                grad_X[rows] = k_tm @ Y_mD - k_tm.sum(1, keepdim=True) * X_nD[rows]
            if wanted_Y:
                grad_Y += k_tm.t() @ X_nD[rows] - k_tm.sum(0)[:, None] * Y_mD
        ctx.save_for_backward(grad_X, grad_Y)
        return total

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor]:
        grad_X, grad_Y = ctx.saved_tensors
        return grad * grad_X, grad * grad_Y
