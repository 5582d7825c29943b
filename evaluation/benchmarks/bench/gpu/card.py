"""What the card itself can do, which the other sections compare with: copies and matrix products."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch
from bench.gpu.setting import COPY, MATMUL, Figures, Setting, row

# Type of the operands, and PyTorch's setting for products of float32.
PRODUCTS = {
    "bfloat16": (torch.bfloat16, "highest"),
    "tf32": (torch.float32, "high"),
    "float32": (torch.float32, "highest"),
}


def bench_card(setting: Setting) -> Iterator[Figures]:
    """Bandwidth of a copy within the memory, reads and writes together, and rates of a square product."""
    size = 2**20 if setting.small else 2**31
    seconds = setting.time({COPY: _copy(size, setting.device)})[COPY].median_s
    yield row(COPY, f"{size / 2**20:,.0f} MiB", 2 * size / seconds / 1e9, "GB/s", seconds=seconds)
    width = 128 if setting.small else 8192
    for name, (dtype, precision) in PRODUCTS.items():
        torch.set_float32_matmul_precision(precision)
        seconds = setting.time({name: _product(width, dtype, setting.device)})[name].median_s
        rate = 2 * width**3 / seconds / 1e12
        yield row(MATMUL.format(name), f"{width:,} x {width:,}", rate, "TFLOP/s", seconds=seconds)


def _copy(size: int, device: str) -> Callable[[], object]:
    source = torch.ones(size // 4, device=device)
    target = torch.empty_like(source)
    return lambda: target.copy_(source)


def _product(width: int, dtype: torch.dtype, device: str) -> Callable[[], object]:
    a, b = (torch.randn(width, width, device=device, dtype=dtype) for _ in range(2))
    return lambda: a @ b
