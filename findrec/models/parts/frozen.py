"""Freezes a trained module inside another model."""

from __future__ import annotations

from torch import nn


def freeze(module: nn.Module) -> None:
    """Turn all weights of a module into buffers, under the same names.

    Buffers are saved with the model, but have no gradient and no optimizer state, and are never split among
    workers.
    """
    for part in module.modules():
        for name, parameter in list(part._parameters.items()):
            if parameter is not None:
                del part._parameters[name]
                part.register_buffer(name, parameter.detach().clone())
