"""Benchmark of the exact and sampled catalogue loss against `F.cross_entropy` of all logits.

The baseline excludes the padding row by a view of the table, without a copy.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from bench.compare import Case, compare
from bench.rows import Row
from torch import Tensor
from torch.nn import functional as F

from findrec.ops.losses.linear_cross_entropy import linear_cross_entropy
from findrec.ops.losses.sampled_cross_entropy import sampled_cross_entropy

SHAPES = ((2048, 100_000, 128), (4096, 20_000, 64), (8192, 1682, 64))  # T, V, d
BASELINE = "F.cross_entropy"
NEGATIVES = 1024


def loss_and_gradients(impl: str, h_Td: Tensor, table_Vd: Tensor, target_T: Tensor) -> tuple[Tensor, ...]:
    """The summed loss of `impl` (`BASELINE`, `sampled` or a `linear_cross_entropy` impl), dh and dtable."""
    if impl == BASELINE:
        loss = F.cross_entropy(h_Td @ table_Vd[1:].t(), target_T - 1, reduction="sum")
    elif impl == "sampled":
        return _sampled(h_Td, table_Vd, target_T)
    else:
        loss = linear_cross_entropy(h_Td, table_Vd, target_T, impl=impl)  # type: ignore[arg-type]
    return (loss.detach(), *torch.autograd.grad(loss, (h_Td, table_Vd)))


def _sampled(h_Td: Tensor, table_Vd: Tensor, target_T: Tensor) -> tuple[Tensor, ...]:
    """The sampled loss as in training: uniform negatives, row gradients added to the table's."""
    num_items = table_Vd.shape[0] - 1
    sample_S = torch.randint(1, num_items + 1, (NEGATIVES,), device=h_Td.device)
    rows_Sd, rows_Td = (table_Vd.detach()[ids].requires_grad_() for ids in (sample_S, target_T))
    log_expected_S = torch.full((NEGATIVES,), NEGATIVES / num_items, device=h_Td.device).log()
    loss = sampled_cross_entropy(h_Td, rows_Td, rows_Sd, target_T, sample_S, log_expected_S)
    dh_Td, drows_Sd, drows_Td = torch.autograd.grad(loss, (h_Td, rows_Sd, rows_Td))
    dtable_Vd = torch.zeros_like(table_Vd)
    dtable_Vd.index_add_(0, sample_S, drows_Sd).index_add_(0, target_T, drows_Td)
    return loss.detach(), dh_Td, dtable_Vd


def make_run(impl: str, shape: tuple[int, int, int], device: str = "cpu") -> Callable[[], None]:
    """Return a function that runs one forward and backward pass of `impl` on fixed random inputs."""
    tokens, items, width = shape
    generator = torch.Generator().manual_seed(0)
    # Logits of unit variance, as of an untrained table; larger ones would measure denormal arithmetic.
    h_Td = torch.randn(tokens, width, generator=generator).to(device).requires_grad_()
    table_Vd = (
        torch.randn(items + 1, width, generator=generator).mul_(width**-0.5).to(device).requires_grad_()
    )
    target_T = torch.randint(1, items + 1, (tokens,), generator=generator).to(device)

    def run() -> None:
        loss_and_gradients(impl, h_Td, table_Vd, target_T)

    return run


def bench_cross_entropy(shapes: Sequence[tuple[int, int, int]] = SHAPES, runs: int = 11) -> list[Row]:
    """Measure the baseline and the tiled loss at each `(T, V, d)`, and the sampled loss at the first."""
    cases = [
        Case(
            shape,
            "T{} V{} d{}".format(*shape),
            [BASELINE],
            ["tiled", "sampled"] if n == 0 else ["tiled"],
            runs,
        )
        for n, shape in enumerate(shapes)
    ]
    return compare("linear_cross_entropy", cases, make_run)
