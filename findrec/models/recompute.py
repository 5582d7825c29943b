"""Activation checkpointing: a layer keeps its input alone and is run again in the backward pass.

Memory falls from what all layers keep to the layers' inputs and what one of them keeps; a step does about a
third more work (Chen et al. 2016, arXiv 1604.06174). Random numbers are drawn anew from the same state, so
gradients are the same to the bit.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeVar, cast

import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

Result = TypeVar("Result")


class Recomputing(nn.Module):
    """A module that runs its layers by `run_layer`."""

    recompute = False  # set by `recompute_layers`

    def run_layer(self, layer: Callable[..., Result], *arguments: object) -> Result:
        """`layer(*arguments)`, which returns a tensor or a tuple of them."""
        if not (self.recompute and torch.is_grad_enabled()):
            return layer(*arguments)
        # Shapes are not compared, as those of weights that ZeRO-3 has given up in between differ.
        found = checkpoint(layer, *arguments, use_reentrant=False, determinism_check="none")
        return cast(Result, found)


def recompute_layers(model: nn.Module) -> None:
    """Switch activation checkpointing on in every part of `model` that knows it."""
    for module in model.modules():
        if isinstance(module, Recomputing):
            module.recompute = True
