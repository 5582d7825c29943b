"""Sizes of tiles by device: what fits the cache of a CPU leaves a GPU waiting for the next kernel."""

from __future__ import annotations

import torch

GPU_TILE_BYTES = 256 << 20  # a pass over it takes longer than the launch of the kernel that makes it


def tile_bytes(device: torch.device | str, on_cpu: int) -> int:
    """The size of a tile in bytes on a device: `on_cpu` on a CPU, at least `GPU_TILE_BYTES` elsewhere."""
    if torch.device(device).type == "cpu":
        return on_cpu
    return max(on_cpu, GPU_TILE_BYTES)
