"""A training step on paper: bytes a worker sends, seconds it takes, and where more workers stop helping.

Collectives are those of a ring (Patarasuk & Yuan 2009): of n bytes on W workers each sends n (W - 1) / W to
reduce-scatter or to gather them, and twice that to all-reduce. ZeRO's volumes are those of Rajbhandari et al.
2020 (arXiv 1910.02054, section 7), but counted as DeepSpeed 0.19.8 moves them: stages 2 and 3 reduce after
every microbatch, stages 1 and 2 by all-reduce.

Letters: W workers, A microbatches of a worker and step (K / W), P weights of the tower, V items, d width,
T targets of a microbatch, U its distinct items, N own items of a target.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Literal

_FLOAT, _ID = 4, 8
Table = Literal["replicated", "sharded"]


@dataclass(frozen=True)
class Step:
    """What decides the traffic and the work of a step with the exact loss."""

    workers: int
    accumulation: int  # A
    weights: int  # P
    items: int  # V
    dim: int  # d
    targets: int  # T
    distinct: int  # U
    own: int = 0  # N, own items of a target that get a bonus
    stage: int = 2
    table: Table = "replicated"


@dataclass(frozen=True)
class Hardware:
    """Sustained rates of one worker."""

    flops: float  # a second, in the products of the step
    memory_bytes: float  # a second, read and written by the optimizer
    network_bytes: float  # a second, sent


def sent_bytes(step: Step) -> dict[str, float]:
    """Bytes that one worker sends in a step, by part."""
    w, a = step.workers, step.accumulation
    ring = (w - 1) / w
    tower = _FLOAT * step.weights * ring
    reduced = {0: 2, 1: 2, 2: 2 * a, 3: a}[step.stage] * tower
    gathered = {0: 0, 1: 1, 2: 1, 3: 2 * a}[step.stage] * tower
    found = {"tower gradients": reduced, "tower weights": gathered}
    if step.table == "replicated":
        found["table gradient"] = 2 * ring * _FLOAT * step.items * step.dim
        return found
    row = _FLOAT * step.dim
    # Ids go out twice and rows and their gradients once, to the owners of other rows.
    found["table rows"] = a * ring * step.distinct * (2 * row + 2 * _ID)
    # Every worker's targets meet every worker's rows: vectors are gathered, gradients scattered, and bonuses
    # of own items with them; a maximum and two sums of every target are all-reduced.
    found["loss vectors"] = a * (w - 1) * step.targets * (2 * row + 2 * _ID + 2 * _FLOAT * step.own)
    found["loss sums"] = 2 * a * ring * w * step.targets * 3 * _FLOAT
    return found


def flops(step: Step) -> float:
    """Of one worker's step, gradients included: 6 a weight and position for the tower, 6 an item, target and
    channel for the loss; sharded, each worker has a part of the items and all workers' targets.
    """
    return 6.0 * step.accumulation * step.targets * (step.weights + step.items * step.dim)


def optimizer_bytes(step: Step) -> float:
    """Read and written by AdamW on one worker: weight, gradient and two moments, three of them written."""
    rows = step.items if step.table == "replicated" else -(-step.items // step.workers)
    weights = step.weights if step.stage == 0 else -(-step.weights // step.workers)
    return 7.0 * _FLOAT * (rows * step.dim + weights)


def step_seconds(step: Step, hardware: Hardware) -> dict[str, float]:
    """Seconds of a step by part; nothing overlaps, as nothing does in DeepSpeed's stages as they are set."""
    return {
        "compute": flops(step) / hardware.flops,
        "optimizer": optimizer_bytes(step) / hardware.memory_bytes,
        "network": sum(sent_bytes(step).values()) / hardware.network_bytes,
    }


def efficiency(step: Step, hardware: Hardware) -> float:
    """Targets a second and worker, against one worker that runs A microbatches of its own, table whole."""
    alone = replace(step, workers=1, stage=0, table="replicated")
    return sum(step_seconds(alone, hardware).values()) / sum(step_seconds(step, hardware).values())


# Round figures, not measured, of one H100 (SXM) with 400 Gb/s of network: float32 products, as a run makes
# them, at 60% of 67 TFLOP/s, and 80% of the rates that memory and network are sold with.
H100 = Hardware(flops=40e12, memory_bytes=2.7e12, network_bytes=40e9)
GPUS = (8, 64, 1024)
PAPER = Step(
    workers=1, accumulation=1, weights=2_000_000, items=1_000_000, dim=128, targets=25_600, distinct=20_000
)


def paper_table(base: Step = PAPER, hardware: Hardware = H100) -> str:
    """A Markdown table: traffic a worker, seconds and efficiency by GPUs and placement of the item table."""
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


def sharding_pays_below(step: Step) -> float:
    """The first number of workers with which a sharded table sends more than a replicated one (inf: none)."""
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
