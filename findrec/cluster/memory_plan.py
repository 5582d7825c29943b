"""Memory of one worker by part, from sizes alone: nothing is allocated.

Training is in float32. The tower is sharded by DeepSpeed as ZeRO says (Rajbhandari et al. 2020, arXiv
1910.02054, section 5): of P weights on W workers, stage 1 shards the optimizer, stage 2 the gradients too.
DeepSpeed keeps a float32 copy of the shard that it updates beside the weights, which are float32 here
already, so its optimizer is three numbers a weight of the shard. The table's optimizer is our own.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from findrec.cluster.activations import (
    FLOAT,
    MicrobatchShape,
    activation_bytes,
    loss_bytes,
    own_items_bytes,
)
from findrec.cluster.engine import BUCKET_ELEMENTS
from findrec.config import RunConfig

PROCESS_BYTES = 512 << 20  # of a worker that has loaded torch, DeepSpeed and Ray, 420 MiB, and its first tensors
CUDA_CONTEXT_BYTES = 512 << 20
_USER_BYTES = 6 * 8  # where a user's history lies, its length and its cuts
_WINDOW_BYTES = 4 * 8 + 3 * 8  # a window, and its place in the plan while that is made

Place = Literal["device", "host"]  # the GPU where there is one, and the machine's own memory


@dataclass(frozen=True)
class Part:
    """One line of the account."""

    name: str
    bytes: int
    place: Place


@dataclass(frozen=True)
class Sizes:
    """What decides the memory of a worker beside the configuration."""

    num_weights: int  # of the tower
    table_rows: int  # held by one worker, padding included
    num_items: int
    num_users: int
    num_windows: int
    feature_dims: Mapping[str, int]
    shape: MicrobatchShape


@dataclass(frozen=True)
class Need:
    """Memory of one worker."""

    parts: tuple[Part, ...]

    def total(self, *places: Place) -> int:
        """Bytes in the given places."""
        return sum(part.bytes for part in self.parts if part.place in places)


def tower_bytes(num_weights: int, stage: int, workers: int) -> dict[str, int]:
    """Bytes of weights, gradients and optimizer of the tower on one of `workers`, for ZeRO stage 1 or 2.

    DeepSpeed pads a shard by a few numbers, which are not counted.
    """
    if stage not in (1, 2):
        raise ValueError(f"tower_bytes: ZeRO stage {stage} is not one of 1, 2")
    shard = -(-num_weights // workers)
    # Stage 2 gives a gradient up once its bucket is reduced; stage 1 keeps all until the step.
    unreduced = num_weights if stage == 1 else min(num_weights, BUCKET_ELEMENTS)
    return {
        "weights": FLOAT * num_weights,
        "gradients": FLOAT * (unreduced + shard + BUCKET_ELEMENTS),
        "optimizer": FLOAT * 3 * shard,
    }


def table_bytes(config: RunConfig, rows: int) -> dict[str, int]:
    """Bytes of weights, gradients and optimizer of `rows` rows of the item table."""
    dense = FLOAT * rows * config.model.dim
    proposal = 8 * rows if config.training.loss.kind == "sampled" else 0
    return {"weights": dense + proposal, "gradients": dense, "optimizer": 2 * dense}


def worker_memory(config: RunConfig, sizes: Sizes, *, gpu: bool) -> Need:
    """What one worker needs at the height of a step, part by part."""
    parts: list[Part] = []

    def add(name: str, size: int, place: Place = "device") -> None:
        if size:
            parts.append(Part(name, size, place))

    stage, workers = config.cluster.zero_stage, config.cluster.workers
    for name, size in tower_bytes(sizes.num_weights, stage, workers).items():
        add(f"tower {name}", size)
    for name, size in table_bytes(config, sizes.table_rows).items():
        add(f"table {name}", size)
    dims = sizes.feature_dims
    add("activations", activation_bytes(config, dims, sizes.shape))
    add("own items", own_items_bytes(config, sizes.shape, on_gpu=gpu))
    add("loss chunk", loss_bytes(config, dims, sizes.shape, sizes.num_items, on_gpu=gpu))
    if config.model.items.features in ("score", "both") and config.training.loss.kind == "exact":
        add("features of all items", FLOAT * (sizes.num_items + 1) * sum(dims.values()))
    index = _USER_BYTES * sizes.num_users + _WINDOW_BYTES * sizes.num_windows + 16 * (sizes.num_items + 1)
    add("plan and index", index, "host")
    if gpu:
        add("CUDA context", CUDA_CONTEXT_BYTES)
        # Rank 0 copies what a checkpoint holds of the table before it writes it.
        add("checkpoint", 3 * FLOAT * sizes.table_rows * config.model.dim, "host")
    add("process", PROCESS_BYTES, "host")
    return Need(tuple(parts))


def machine_memory() -> int:
    """Bytes this machine has, or this container may use where it is limited."""
    limits = [os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")]
    for file in ("/sys/fs/cgroup/memory.max", "/sys/fs/cgroup/memory/memory.limit_in_bytes"):
        try:
            limits.append(int(Path(file).read_text()))
        except (OSError, ValueError):  # not there, or "max"
            continue
    return min(limits)
