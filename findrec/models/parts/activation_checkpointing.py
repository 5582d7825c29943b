"""Activation checkpointing: a layer stores only its input and is recomputed in the backward pass.

Memory falls to the inputs of all layers plus the activations of one, at the cost of about a third more work
(Chen et al. 2016, arXiv 1604.06174). The random state is restored, so gradients are the same bit for bit.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeVar, cast

import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

Result = TypeVar("Result")


class CheckpointedModule(nn.Module):
    """A module that can checkpoint its layers, which it runs through `run_layer`."""

    checkpoint_activations = False  # set by `enable_activation_checkpointing`

    def run_layer(self, layer: Callable[..., Result], *arguments: object) -> Result:
        """Return `layer(*arguments)`, a tensor or a tuple of tensors."""
        if not (self.checkpoint_activations and torch.is_grad_enabled()):
            return layer(*arguments)
        # Shapes are not compared, as those of weights that ZeRO-3 releases in between differ.
        result = checkpoint(layer, *arguments, use_reentrant=False, determinism_check="none")
        return cast(Result, result)


def enable_activation_checkpointing(model: nn.Module) -> None:
    """Enable activation checkpointing in all parts of `model` that support it."""
    for module in model.modules():
        if isinstance(module, CheckpointedModule):
            module.checkpoint_activations = True
