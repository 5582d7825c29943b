"""Copies from the CPU to a GPU that nobody waits for."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

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


class CopyStream:
    """Copies to a GPU beside its other work: on a stream of their own, also from another thread."""

    def __init__(self, device: torch.device | str) -> None:
        self._device = torch.device(device)
        self._module: Any = torch.get_device_module(self._device)
        self._stream = self._module.Stream(device=self._device)

    def copy(self, large: Mapping[str, Tensor], small: Mapping[str, Tensor]) -> Arriving:
        """Begin to copy tensors of the CPU; `small` ones are joined to few copies (`copy_all_to`)."""
        with self._module.stream(self._stream):
            there = {name: copy_to(value, self._device) for name, value in large.items()}
            there |= copy_all_to(small, self._device)
            return Arriving(there, self._stream.record_event(), self._module)


class Arriving:
    """Tensors that are being copied to a GPU by a `CopyStream`."""

    def __init__(self, there: Mapping[str, Tensor], event: Any, module: Any) -> None:
        self._there, self._event, self._module = there, event, module

    def arrived(self) -> Mapping[str, Tensor]:
        """The copies, for kernels launched from now on: these wait for them, the host does not."""
        for value in self._there.values():
            stream = self._module.current_stream(value.device)
            stream.wait_event(self._event)
            value.record_stream(stream)  # else the copy stream may reuse the memory before it was read
        return self._there
