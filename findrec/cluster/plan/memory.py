"""Estimates the memory of one worker by component, from sizes only.

Training is in float32. DeepSpeed shards the tower by ZeRO (Rajbhandari et al. 2020, arXiv 1910.02054, section
5): stage 1 shards the optimizer, stage 2 also the gradients, stage 3 also the weights, which are gathered
while a layer runs. DeepSpeed additionally needs the bucket in which gradients are reduced and, in stages 1
and 2, a float32 copy of the shard that it updates, although the weights are float32.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

from findrec.cluster.plan.activations import (
    FLOAT,
    MicrobatchShape,
    loss_bytes,
    repeat_bonus_bytes,
)
from findrec.cluster.zero.config import BUCKET_ELEMENTS, LIVE_ELEMENTS
from findrec.config import RunConfig
from findrec.datasets.batches.catalogue import fit_gpu
from findrec.datasets.batches.examples import PREFETCHED_STEPS
from findrec.tables.base import ITEMS
from findrec.tables.placement import Placement

# A worker process after loading torch, DeepSpeed and Ray.
PROCESS_BYTES = 512 << 20
CUDA_CONTEXT_BYTES = 512 << 20
FEATURE_TABLES = "feature tables"
_USER_BYTES = 6 * 8  # location, length and cuts of a history
_WINDOW_BYTES = 4 * 8 + 3 * 8  # a window, and its position in the plan under construction

Location = Literal["device", "host"]  # memory of the GPU, if there is one, or of the machine


@dataclass(frozen=True)
class Part:
    """The memory of one component."""

    name: str
    bytes: int
    location: Location


@dataclass(frozen=True)
class Sizes:
    """The sizes that, with the configuration, determine the memory of a worker."""

    num_weights: int  # of the tower
    tables: Mapping[str, Placement]
    num_items: int
    num_users: int
    num_windows: int
    feature_dims: Mapping[str, int]
    shape: MicrobatchShape  # of the largest microbatch
    activations: int  # bytes of the model for it
    feature_bytes: int = 0  # of the feature tables of all items, in fp16


@dataclass(frozen=True)
class WorkerMemory:
    """The memory of one worker."""

    parts: tuple[Part, ...]

    def total(self, *locations: Location) -> int:
        """Bytes in the given locations."""
        return sum(part.bytes for part in self.parts if part.location in locations)


def tower_parts(num_weights: int, stage: int, workers: int, *, gpu: bool, offload: bool) -> list[Part]:
    """Weights, gradients and optimizer of the tower on one of `workers`, for ZeRO stage 0 to 3.

    The padding of shards is not counted. Raises `ValueError` for another stage.
    """
    if stage not in (0, 1, 2, 3):
        raise ValueError(f"tower_parts: ZeRO stage {stage} is not one of 0, 1, 2, 3")
    whole, shard = num_weights, -(-num_weights // workers)
    # On a CPU the memory of a bucket is only allocated as it is filled.
    bucket = BUCKET_ELEMENTS if gpu else min(whole, BUCKET_ELEMENTS)
    live = min(whole, LIVE_ELEMENTS)
    weights = shard + live if stage == 3 else whole
    gradients = {
        0: 2 * whole,  # copied into one tensor to be reduced
        1: whole + shard + bucket,  # kept until the step
        2: min(whole, BUCKET_ELEMENTS) + shard + bucket,  # released as buckets are reduced
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


def table_parts(config: RunConfig, tables: Mapping[str, Placement], num_items: int) -> list[Part]:
    """Weights, gradients and optimizer of the local rows of all tables."""
    weights = _table_weights(tables)
    sampled = config.training.loss.kind == "sampled" and ITEMS in tables
    proposal = 8 * (num_items + 1) if sampled else 0
    return [
        Part("table weights", weights + proposal, "device"),
        Part("table gradients", sum(table.bytes for table in tables.values()) - 3 * weights, "device"),
        Part("table optimizer", 2 * weights, "device"),
    ]


def _table_weights(tables: Mapping[str, Placement]) -> int:
    return sum(FLOAT * table.rows * table.dim for table in tables.values())


def worker_memory(
    config: RunConfig, sizes: Sizes, *, gpu: bool, gpu_memory: int | None = None
) -> WorkerMemory:
    """The peak memory of one worker by component.

    `gpu_memory` is that of its GPU in bytes, which decides where feature tables are kept
    (`Catalogue.keep_on`). If it is unknown, they are counted as kept on the GPU.
    """
    cluster, dims, shape = config.cluster, sizes.feature_dims, sizes.shape
    items = sizes.tables.get(ITEMS)
    parts = tower_parts(
        sizes.num_weights, cluster.zero_stage, cluster.workers, gpu=gpu, offload=cluster.offload_optimizer
    )
    parts += table_parts(config, sizes.tables, sizes.num_items)
    parts += [
        Part("activations", sizes.activations, "device"),
        Part("repeat bonuses", repeat_bonus_bytes(config, shape, on_gpu=gpu), "device"),
    ]
    if items is not None:
        chunk = loss_bytes(config, dims, shape, items.rows, row_width=items.dim, on_gpu=gpu)
        parts.append(Part("loss chunk", chunk, "device"))
    if items is not None and items.mode == "sharded" and config.training.loss.kind == "exact":
        # Each worker gathers the user vectors of all workers, and returns their gradients.
        gathered = 2 * FLOAT * cluster.workers * shape.targets * config.model.vector_dim(dims)
        parts.append(Part("vectors of all workers", gathered, "device"))
    if config.model.scores_content and config.training.loss.kind == "exact":
        every = FLOAT * (sizes.num_items + 1) * sum(dims.values())
        parts.append(Part("features of all items", every, "device"))
    index = _USER_BYTES * sizes.num_users + _WINDOW_BYTES * sizes.num_windows + 16 * (sizes.num_items + 1)
    parts.append(Part("plan and index", index, "host"))
    if gpu:
        parts.append(Part("CUDA context", CUDA_CONTEXT_BYTES, "device"))
        # Table rows and moments are copied to host memory for a checkpoint.
        parts.append(Part("checkpoint", 3 * _table_weights(sizes.tables), "host"))
        parts += _feature_parts(config, sizes, gpu_memory, parts)
    parts.append(Part("process", PROCESS_BYTES, "host"))
    return WorkerMemory(tuple(part for part in parts if part.bytes))


def _feature_parts(config: RunConfig, sizes: Sizes, gpu_memory: int | None, others: list[Part]) -> list[Part]:
    """The feature tables if they are kept on the GPU, else the rows that are copied there in advance."""
    on_device = sum(part.bytes for part in others if part.location == "device")
    if gpu_memory is None or fit_gpu(sizes.feature_bytes, gpu_memory - on_device):
        return [Part(FEATURE_TABLES, sizes.feature_bytes, "device")]
    # The loader's thread holds one step beside those that are queued, the training another.
    steps = PREFETCHED_STEPS + 2
    microbatches = config.training.microbatches // config.cluster.workers
    rows = 2 * sizes.shape.distinct * sum(sizes.feature_dims.values())
    return [Part("features read ahead", steps * microbatches * rows, "device")]


def evaluator_memory(config: RunConfig, sizes: Sizes) -> int:
    """Bytes of the asynchronous evaluator: the model, all rows and item vectors."""
    rows = sum((table.num_rows + 1) * table.dim for table in sizes.tables.values())
    vectors = (sizes.num_items + 1) * config.model.vector_dim(sizes.feature_dims)
    return PROCESS_BYTES + FLOAT * (sizes.num_weights + rows + vectors)
