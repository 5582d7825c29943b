"""Training steps at several lengths of histories: targets per second, and what share of the card they use."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from bench.gpu.kernels import empty_cache, reason
from bench.gpu.setting import MATMUL, Figures, Setting, row
from bench.model import SAMPLED, Shape, findrec_step
from torch.utils.flop_counter import FlopCounterMode

from findrec.training.allocator import keep_freed_memory

LENGTHS, TOKENS = (200, 1024, 8192), 65_536
SMALL_LENGTHS, SMALL_TOKENS = (10, 20), 40


def bench_steps(setting: Setting) -> Iterator[Figures]:
    """Full steps of FindRec of one microbatch, in float32 and bfloat16; the exact loss at the first length.

    Model FLOPs are those of the matrix products that PyTorch runs, forward and backward, as it counts them;
    the scan and other elementwise work is not among them, so the share is a lower bound. It is of the rate of
    a large bfloat16 product, whatever the precision.
    """
    keep_freed_memory()
    lengths, tokens = (SMALL_LENGTHS, SMALL_TOKENS) if setting.small else (LENGTHS, TOKENS)
    for length in lengths:
        exact = length == lengths[0]
        for loss, keys in {"sampled": SAMPLED, **({"exact": ()} if exact else {})}.items():
            for precision in ("float32", "bfloat16"):
                what = f"{loss} loss, {precision}"
                shape = _shape(max(1, tokens // length), length, setting)
                torch.set_float32_matmul_precision("high" if precision == "bfloat16" else "highest")
                try:
                    yield _measured(what, shape, [*keys, f"training.precision={precision}"], setting)
                except Exception as error:
                    yield row(what, str(shape), None, "targets/s", note=reason(error))
                empty_cache(setting.device)


def _shape(rows: int, length: int, setting: Setting) -> Shape:
    if setting.small:
        return Shape(rows, length, 16, 60, (("text", 8),))
    return Shape(rows, length, 128, 100_000, (("text", 384),))


def _measured(what: str, shape: Shape, keys: list[str], setting: Setting) -> Figures:
    step = findrec_step(shape, keys, setting.device)
    step()
    with FlopCounterMode(display=False) as counter:
        targets = step()
    flops = counter.get_total_flops()
    seconds = setting.time({what: step})[what].median_s
    return row(
        what,
        str(shape),
        targets / seconds,
        "targets/s",
        seconds=seconds,
        peak_mib=setting.peak_mib(step),
        note=f"{seconds * 1e3:.1f} ms, {flops / targets / 1e6:.3g} MFLOP per target",
        **setting.share(flops / seconds / 1e12, MATMUL.format("bfloat16")),
    )
