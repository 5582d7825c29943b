"""Reduces the losses and flags of a step over all workers, and checks that they are finite."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor

from findrec.datasets.folder.splits import Int64Array
from findrec.errors import DivergedError
from findrec.models.base import StepLoss
from findrec.tables.collectives import COLLECTIVES
from findrec.training.worker import Worker


@dataclass(frozen=True)
class StepValues:
    """The values of a step; equal on all workers except for diagnostics."""

    values: dict[str, float]  # losses summed over the step in float64, and mean diagnostics of this worker
    bad: list[int]  # microbatches with losses that are not finite
    stop: bool  # whether a worker has a stop request


def sum_over_workers(shares: Mapping[int, StepLoss], microbatches: int, worker: Worker) -> StepValues:
    """Sum the losses of this worker's microbatches (by index) over all workers (a collective call)."""
    first = next(iter(shares.values()))
    names = ["train/loss", *(f"aux/{name}" for name in first.aux)]
    totals = torch.zeros(len(names) + microbatches + 1, dtype=torch.float64)
    losses, diagnostics = _on_host(shares.values())
    for microbatch, parts in zip(shares, losses, strict=True):
        totals[: len(names)] += parts
        totals[len(names) + microbatch] = float(not parts.isfinite().all())
    totals[-1] = float(worker.heartbeat.stop_requested)
    if worker.world > 1:
        totals = totals.to(worker.device)
        with COLLECTIVES.call("sum of the losses"):
            dist.all_reduce(totals)
    *sums, stop = totals.tolist()
    values = dict(zip(names, sums, strict=False))
    for name in first.diagnostics:
        values[f"diagnostics/{name}"] = sum(measured[name] for measured in diagnostics) / len(shares)
    bad = [m for m, count in enumerate(sums[len(names) :]) if count]
    return StepValues(values, bad, stop > 0)


def _on_host(shares: Iterable[StepLoss]) -> tuple[Tensor, list[dict[str, float]]]:
    """The losses `[m, n]` (float64) and the diagnostics of m microbatches, in one copy from their device."""
    shares = list(shares)
    losses = [tensor for share in shares for tensor in (share.loss, *share.aux.values())]
    measured = [t for share in shares for t in share.diagnostics.values() if isinstance(t, Tensor)]
    # Exact: `stack` promotes the scalars to the widest of their types, of which float64 is wider.
    numbers = torch.stack([t.detach() for t in losses + measured]).to(torch.float64).cpu()
    values = iter(numbers[len(losses) :].tolist())
    diagnostics = [
        {name: next(values) if isinstance(t, Tensor) else t for name, t in share.diagnostics.items()}
        for share in shares
    ]
    return numbers[: len(losses)].view(len(shares), -1), diagnostics


def check_finite(
    step_values: StepValues,
    gradient_norms: Mapping[str, float],
    *,
    step: int,
    epoch: int,
    examples: Sequence[Int64Array],
    describe: Callable[[Int64Array], str],
) -> None:
    """Raise `DivergedError`, with the same message on every worker, if losses or gradients are not finite.

    Args:
        step_values: the reduced losses.
        gradient_norms: norms by name.
        step: index of the step, for the message.
        epoch: index of the epoch, for the message.
        examples: the examples of each microbatch of the step.
        describe: describes the examples of a microbatch in words.
    """
    values = {k: v for k, v in step_values.values.items() if not k.startswith("diagnostics/")} | dict(
        gradient_norms
    )
    names = [name for name, value in values.items() if not math.isfinite(value)]
    if not names:
        return
    where = ""
    if step_values.bad:
        microbatch = step_values.bad[0]
        where = f" first in microbatch {microbatch} of {len(examples)}: {describe(examples[microbatch])};"
    raise DivergedError(
        f"{', '.join(names)} is not finite at step {step} (epoch {epoch + 1}):{where} training has diverged. "
        "The last checkpoint is not affected; lower training.optim.lr or set training.optim.clip_tower, "
        "then start the run under a new name."
    )
