"""Memory of one worker by part, from sizes alone: nothing is allocated.

Training is in float32. The tower is sharded by DeepSpeed as ZeRO says (Rajbhandari et al. 2020, arXiv
1910.02054, section 5): of P weights on W workers stage 1 shards the optimizer, stage 2 the gradients too,
stage 3 the weights as well, which are then gathered while a layer runs. What DeepSpeed adds to the paper's
account is counted too: the bucket that gradients are reduced in and, in stages 1 and 2, a float32 copy of the
shard that it updates, though the weights are float32 already. The table's optimizer is our own.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

from findrec.cluster.activations import (
    FLOAT,
    MicrobatchShape,
    activation_bytes,
    loss_bytes,
    own_items_bytes,
)
from findrec.cluster.deepspeed_config import BUCKET_ELEMENTS, LIVE_ELEMENTS
from findrec.config import RunConfig
from findrec.tables.placement import Placement

# Of a worker that has loaded torch, DeepSpeed and Ray, with its first tensors.
PROCESS_BYTES = 512 << 20
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
    table: Placement
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


def tower_parts(num_weights: int, stage: int, workers: int, *, gpu: bool, offload: bool) -> list[Part]:
    """Weights, gradients and optimizer of the tower on one of `workers`, for ZeRO stage 0 to 3.

    DeepSpeed pads a shard by a few numbers, which are not counted. Raises `ValueError` for another stage.
    """
    if stage not in (0, 1, 2, 3):
        raise ValueError(f"tower_parts: ZeRO stage {stage} is not one of 0, 1, 2, 3")
    whole, shard = num_weights, -(-num_weights // workers)
    # A CPU gives memory to a bucket as it is filled, a GPU at once.
    bucket = BUCKET_ELEMENTS if gpu else min(whole, BUCKET_ELEMENTS)
    live = min(whole, LIVE_ELEMENTS)
    weights = shard + live if stage == 3 else whole
    gradients = {
        0: 2 * whole,  # they are copied into one piece to be reduced
        1: whole + shard + bucket,  # all are kept until the step
        2: min(whole, BUCKET_ELEMENTS) + shard + bucket,  # given up as buckets are reduced
        3: min(whole, BUCKET_ELEMENTS) + shard + bucket,
    }[stage]
    optimizer = {0: 2 * whole, 1: 3 * shard, 2: 3 * shard, 3: 2 * shard}[stage]
    parts = [Part("tower weights", FLOAT * weights, "device")]
    if offload:
        gradients -= shard
        optimizer = 4 * shard  # with the gradients, and in stage 3 with a copy of the weights
    parts.append(Part("tower gradients", FLOAT * gradients, "device"))
    parts.append(Part("tower optimizer", FLOAT * optimizer, "host" if offload else "device"))
    return parts


def table_parts(config: RunConfig, table: Placement, num_items: int) -> list[Part]:
    """Weights, gradients and optimizer of the rows of the item table that a worker holds."""
    weights = FLOAT * table.rows * config.model.dim
    proposal = 8 * (num_items + 1) if config.training.loss.kind == "sampled" else 0
    return [
        Part("table weights", weights + proposal, "device"),
        Part("table gradients", table.bytes - 3 * weights, "device"),
        Part("table optimizer", 2 * weights, "device"),
    ]


def worker_memory(config: RunConfig, sizes: Sizes, *, gpu: bool) -> Need:
    """What one worker needs at the height of a step, part by part."""
    cluster, dims, shape = config.cluster, sizes.feature_dims, sizes.shape
    parts = tower_parts(
        sizes.num_weights, cluster.zero_stage, cluster.workers, gpu=gpu, offload=cluster.offload_optimizer
    )
    parts += table_parts(config, sizes.table, sizes.num_items)
    parts += [
        Part("activations", activation_bytes(config, dims, shape), "device"),
        Part("own items", own_items_bytes(config, shape, on_gpu=gpu), "device"),
        Part("loss chunk", loss_bytes(config, dims, shape, sizes.table.rows, on_gpu=gpu), "device"),
    ]
    if sizes.table.mode == "sharded" and config.training.loss.kind == "exact":
        # Each worker is shown the vectors that all workers score, and returns their gradients.
        gathered = 2 * FLOAT * cluster.workers * shape.targets * config.model.dim
        parts.append(Part("vectors of all workers", gathered, "device"))
    if config.model.items.features in ("score", "both") and config.training.loss.kind == "exact":
        every = FLOAT * (sizes.num_items + 1) * sum(dims.values())
        parts.append(Part("features of all items", every, "device"))
    index = _USER_BYTES * sizes.num_users + _WINDOW_BYTES * sizes.num_windows + 16 * (sizes.num_items + 1)
    parts.append(Part("plan and index", index, "host"))
    if gpu:
        parts.append(Part("CUDA context", CUDA_CONTEXT_BYTES, "device"))
        # A worker copies what a checkpoint holds of its table before it writes it.
        parts.append(Part("checkpoint", 3 * FLOAT * sizes.table.rows * config.model.dim, "host"))
    parts.append(Part("process", PROCESS_BYTES, "host"))
    return Need(tuple(part for part in parts if part.bytes))


def evaluator_memory(config: RunConfig, sizes: Sizes) -> int:
    """Bytes that the evaluator beside training holds: the model, all rows and the vectors made of them."""
    return PROCESS_BYTES + FLOAT * (sizes.num_weights + 2 * (sizes.num_items + 1) * config.model.dim)
