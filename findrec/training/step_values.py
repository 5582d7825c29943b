"""The values of a step over all workers: one small all-reduce carries losses, trouble and stops."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
import torch.distributed as dist

from findrec.datasets.folder import DataFolder
from findrec.datasets.plan import Windows
from findrec.datasets.splits import Int64Array
from findrec.errors import DivergedError
from findrec.training.objectives import MicrobatchLoss
from findrec.training.worker import Worker

_NAMED_USERS = 3


@dataclass(frozen=True)
class StepValues:
    """The same on every worker, the diagnostics apart."""

    values: dict[str, float]  # losses of the whole step (sums in float64) and this worker's mean diagnostics
    bad: list[int]  # microbatches whose losses are not finite
    stop: bool  # a worker was asked to stop


def sum_over_workers(shares: Mapping[int, MicrobatchLoss], microbatches: int, worker: Worker) -> StepValues:
    """Join what this worker's microbatches (index -> losses) gave with those of all others (a collective)."""
    first = next(iter(shares.values()))
    names = ["train/loss", *(f"aux/{name}" for name in first.aux)]
    totals = torch.zeros(len(names) + microbatches + 1, dtype=torch.float64)
    for microbatch, share in shares.items():
        parts = torch.stack(
            [p.to(dtype=torch.float64, device="cpu") for p in (share.cross_entropy, *share.aux.values())]
        )
        totals[: len(names)] += parts
        totals[len(names) + microbatch] = float(not parts.isfinite().all())
    totals[-1] = float(worker.pulse.stop_asked)
    if worker.world > 1:
        totals = totals.to(worker.device)
        dist.all_reduce(totals)
    *found, stop = totals.tolist()
    values = dict(zip(names, found, strict=False))
    for name in first.diagnostics:
        values[f"diagnostics/{name}"] = sum(s.diagnostics[name] for s in shares.values()) / len(shares)
    bad = [m for m, count in enumerate(found[len(names) :]) if count]
    return StepValues(values, bad, stop > 0)


def refuse_not_finite(
    found: StepValues,
    gradients: Mapping[str, float],
    *,
    step: int,
    epoch: int,
    chosen: Sequence[Int64Array],
    windows: Windows,
    folder: DataFolder,
) -> None:
    """Raise `DivergedError` on losses or `gradients` (norms) that are not finite, saying where.

    `chosen` are the windows of each microbatch of the step. Every worker raises with the same message.
    """
    values = {k: v for k, v in found.values.items() if not k.startswith("diagnostics/")} | dict(gradients)
    names = [name for name, value in values.items() if not math.isfinite(value)]
    if not names:
        return
    where = ""
    if found.bad:
        microbatch = found.bad[0]
        users = list(dict.fromkeys(windows.user[chosen[microbatch]].tolist()))
        ids = folder.user_ids
        named = ", ".join(repr(ids[user]) for user in users[:_NAMED_USERS])
        more = f" and {len(users) - _NAMED_USERS} more" if len(users) > _NAMED_USERS else ""
        where = f" first in microbatch {microbatch} of {len(chosen)}: users {named}{more};"
    raise DivergedError(
        f"{', '.join(names)} is not finite at step {step} (epoch {epoch + 1}):{where} training has diverged. "
        "The weights of the last checkpoint are untouched; lower training.optim.lr or set "
        "training.optim.clip_tower, then start the run again under a new name."
    )
