"""Chooses how float32 products are computed on a GPU, for the whole process or inside a context."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch


def allow_tf32(allowed: bool) -> None:
    """Let a GPU round the operands of float32 products to TF32 (10 bits), or not.

    This concerns matrix products and cuDNN's recurrent layers and convolutions, which PyTorch allows by
    default to use TF32.
    """
    torch.set_float32_matmul_precision("high" if allowed else "highest")
    torch.backends.cudnn.allow_tf32 = allowed


@contextmanager
def full_float32(device: torch.device | str) -> Iterator[None]:
    """Compute float32 products in float32 inside the context: without TF32, bfloat16 products and autocast.

    Afterwards the settings are as before.
    """
    cuda, cudnn = torch.backends.cuda.matmul, torch.backends.cudnn
    before = torch.get_float32_matmul_precision(), cudnn.allow_tf32
    reduced = cuda.allow_bf16_reduced_precision_reduction
    allow_tf32(False)
    cuda.allow_bf16_reduced_precision_reduction = False
    try:
        with torch.autocast(torch.device(device).type, enabled=False):
            yield
    finally:
        torch.set_float32_matmul_precision(before[0])
        cudnn.allow_tf32 = before[1]
        cuda.allow_bf16_reduced_precision_reduction = reduced
