"""Analytical model of a training step: bytes sent per worker, seconds, and scaling efficiency.

Collectives use a ring (Patarasuk & Yuan 2009): for n bytes on W workers, each sends n (W - 1) / W to
reduce-scatter or gather, and twice that to all-reduce. ZeRO's volumes are those of Rajbhandari et al. 2020
(arXiv 1910.02054, section 7), adapted to DeepSpeed 0.19.8: stages 2 and 3 reduce after every microbatch,
stages 1 and 2 by all-reduce.

Letters: W workers, A microbatches per worker and step (K / W), P weights of the tower, V items, d width,
T targets of a microbatch, U its distinct items, N repeat candidates of a target.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Literal

_FLOAT, _ID = 4, 8
Table = Literal["replicated", "sharded"]


@dataclass(frozen=True)
class Step:
    """Parameters of a step with the exact loss."""

    workers: int
    accumulation: int  # A
    weights: int  # P
    items: int  # V
    dim: int  # d
    targets: int  # T
    distinct: int  # U
    repeats: int = 0  # N
    stage: int = 2
    table: Table = "replicated"


@dataclass(frozen=True)
class Hardware:
    """Sustained rates of one worker."""

    flops: float  # per second, in matrix products
    memory_bytes: float  # per second, read and written by the optimizer
    network_bytes: float  # per second, sent


def sent_bytes(step: Step) -> dict[str, float]:
    """Bytes that one worker sends per step, by part."""
    w, a = step.workers, step.accumulation
    ring = (w - 1) / w
    tower = _FLOAT * step.weights * ring
    reduced = {0: 2, 1: 2, 2: 2 * a, 3: a}[step.stage] * tower
    gathered = {0: 0, 1: 1, 2: 1, 3: 2 * a}[step.stage] * tower
    sent = {"tower gradients": reduced, "tower weights": gathered}
    if step.table == "replicated":
        sent["table gradient"] = 2 * ring * _FLOAT * step.items * step.dim
        return sent
    row = _FLOAT * step.dim
    # Ids are sent twice, rows and their gradients once, between requesting worker and owner.
    sent["table rows"] = a * ring * step.distinct * (2 * row + 2 * _ID)
    # All targets are scored against all rows: vectors are gathered, gradients scattered, both with the
    # repeat-consumption bonuses; a maximum and two sums per target are all-reduced.
    sent["loss vectors"] = a * (w - 1) * step.targets * (2 * row + 2 * _ID + 2 * _FLOAT * step.repeats)
    sent["loss sums"] = 2 * a * ring * w * step.targets * 3 * _FLOAT
    return sent


def flops(step: Step) -> float:
    """Operations of one worker per step: 6 P per target in the tower, and 6 V d per target in the loss."""
    return 6.0 * step.accumulation * step.targets * (step.weights + step.items * step.dim)


def optimizer_bytes(step: Step) -> float:
    """Bytes that AdamW reads (weight, gradient, two moments) and writes (all but the gradient) per worker."""
    rows = step.items if step.table == "replicated" else -(-step.items // step.workers)
    weights = step.weights if step.stage == 0 else -(-step.weights // step.workers)
    return 7.0 * _FLOAT * (rows * step.dim + weights)


def step_seconds(step: Step, hardware: Hardware) -> dict[str, float]:
    """Seconds of a step by part, without overlap, as DeepSpeed is configured."""
    return {
        "compute": flops(step) / hardware.flops,
        "optimizer": optimizer_bytes(step) / hardware.memory_bytes,
        "network": sum(sent_bytes(step).values()) / hardware.network_bytes,
    }


def efficiency(step: Step, hardware: Hardware) -> float:
    """Targets per second and worker, relative to a single worker with A microbatches."""
    alone = replace(step, workers=1, stage=0, table="replicated")
    return sum(step_seconds(alone, hardware).values()) / sum(step_seconds(step, hardware).values())


# Round figures, not measured, of one H100 (SXM) with a 400 Gb/s network: float32 products at 60 % of
# 67 TFLOP/s, and 80 % of the nominal memory and network rates.
H100 = Hardware(flops=40e12, memory_bytes=2.7e12, network_bytes=40e9)
GPUS = (8, 64, 1024)
PAPER = Step(
    workers=1, accumulation=1, weights=2_000_000, items=1_000_000, dim=128, targets=25_600, distinct=20_000
)


def paper_table(base: Step = PAPER, hardware: Hardware = H100) -> str:
    """A Markdown table of traffic per worker, seconds and efficiency by GPUs and table placement."""
    lines = [
        "| GPUs | table | tower MB | table MB | compute ms | optimizer ms | network ms | efficiency |",
        "|---:|---|---:|---:|---:|---:|---:|---:|",
    ]
    for workers in GPUS:
        for table in ("replicated", "sharded"):
            step = replace(base, workers=workers, table=table)
            sent, seconds = sent_bytes(step), step_seconds(step, hardware)
            tower = sum(size for part, size in sent.items() if part.startswith("tower"))
            cells = [
                f"{workers:,}",
                table,
                f"{tower / 1e6:,.0f}",
                f"{(sum(sent.values()) - tower) / 1e6:,.0f}",
                *(f"{1e3 * seconds[part]:,.1f}" for part in ("compute", "optimizer", "network")),
                f"{efficiency(step, hardware):.2f}",
            ]
            lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def sharding_break_even(step: Step) -> float:
    """The smallest number of workers with which a sharded table sends more than a replicated one (or inf)."""
    w = 2
    while w < 1 << 20:
        sent: Mapping[Table, float] = {
            table: sum(sent_bytes(replace(step, workers=w, table=table)).values())
            for table in ("replicated", "sharded")
        }
        if sent["sharded"] > sent["replicated"]:
            return w
        w += 1
    return float("inf")
