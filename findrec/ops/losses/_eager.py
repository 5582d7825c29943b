"""An autograd loss that computes its gradients in the forward pass, while the intermediate values exist."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

Gradients = tuple[Tensor | None, ...]
# `walk(tensors, needs_grad)` returns the loss, and the gradients of the first len(needs_grad) tensors,
# None for those that need none.
Walk = Callable[[tuple[Tensor | None, ...], tuple[bool, ...]], tuple[Tensor, Gradients]]


def eager_loss(walk: Walk, num_floats: int, *tensors: Tensor | None) -> Tensor:
    """The loss that `walk` returns, differentiable once in the first `num_floats` of `tensors`."""
    loss: Tensor = _EagerLoss.apply(walk, num_floats, torch.is_grad_enabled(), *tensors)  # type: ignore[no-untyped-call]
    return loss


class _EagerLoss(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, walk: Walk, num_floats: int, differentiate: bool, *tensors: Tensor | None
    ) -> Tensor:
        ctx.walk = walk
        ctx.needs_grad = tuple(ctx.needs_input_grad[3 : 3 + num_floats])
        ctx.save_for_backward(*tensors)
        loss, ctx.gradients = walk(tensors, ctx.needs_grad if differentiate else (False,) * num_floats)
        return loss

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        tensors = ctx.saved_tensors
        gradients, ctx.gradients = ctx.gradients, None
        if gradients is None:  # a retained graph: the first backward pass consumed the gradients
            _, gradients = ctx.walk(tensors, ctx.needs_grad)
        # Scaled in place: a new tensor would be a second gradient of the table's size.
        torch._foreach_mul_([gradient for gradient in gradients if gradient is not None], grads[0])
        scaled = [
            None if gradient is None else gradient.to(source.dtype)
            for gradient, source in zip(gradients, tensors, strict=False)
        ]
        return (None, None, None, *scaled, *(None,) * (len(tensors) - len(scaled)))
