"""Copies from the CPU to a GPU that nobody waits for."""

from __future__ import annotations

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


def free_bytes(device: torch.device | str) -> int:
    """Memory of a GPU that nothing is stored in."""
    free: int = torch.get_device_module(device).mem_get_info(device)[0]
    return free
