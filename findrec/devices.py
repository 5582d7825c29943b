"""Copies from the CPU to a GPU that nobody waits for."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor


def is_cpu(device: torch.device | str) -> bool:
    """Whether a device is the CPU, whose values can be read at no cost."""
    return torch.device(device).type == "cpu"


def copy_to(value: Tensor, device: torch.device | str) -> Tensor:
    """`value` on a device.

    A copy from the CPU to a GPU is made from page-locked memory, which the GPU reads by itself, so that
    neither the host nor the kernels before the copy are waited for.
    """
    device = torch.device(device)
    if device.type == value.device.type or device.type == "cpu":
        return value.to(device)
    if device.type == "cuda" and not value.is_pinned():
        value = value.pin_memory()
    return value.to(device, non_blocking=True)


def copy_all_to(values: Mapping[str, Tensor], device: torch.device | str) -> dict[str, Tensor]:
    """Tensors on a device, by name; from the CPU to a GPU in one copy for each of their types (`copy_to`).

    The copies on a GPU are parts of one tensor.
    """
    if is_cpu(device) or any(not is_cpu(value.device) for value in values.values()):
        return {name: value.to(device) for name, value in values.items()}
    copies: dict[str, Tensor] = {}
    for dtype in {value.dtype for value in values.values()}:
        some = {name: value for name, value in values.items() if value.dtype == dtype}
        joined = copy_to(torch.cat([value.reshape(-1) for value in some.values()]), device)
        parts = torch.split(joined, [value.numel() for value in some.values()])
        copies |= {
            name: part.view(value.shape) for (name, value), part in zip(some.items(), parts, strict=True)
        }
    return copies


def free_bytes(device: torch.device | str) -> int:
    """Memory of a GPU that nothing is stored in."""
    free: int = torch.get_device_module(device).mem_get_info(device)[0]
    return free
