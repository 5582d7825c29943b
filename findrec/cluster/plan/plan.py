"""The plan of a training on given machines: workers, steps and memory.

It is made by the code that training uses for microbatches and models. Memory is an estimate
(`findrec.cluster.plan.memory`); a test compares it with measured peaks, which it meets within a factor of
1.5.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from torch import Tensor

from findrec.cluster.plan.activations import MicrobatchShape, measure_microbatch
from findrec.cluster.plan.machines import Machine, place_workers, use_gpus
from findrec.cluster.plan.memory import Sizes, WorkerMemory, evaluator_memory, worker_memory
from findrec.config import RunConfig
from findrec.datasets.batches.batch import Batch
from findrec.datasets.batches.examples import ExampleSource
from findrec.datasets.batches.plan import EpochPlan, share
from findrec.datasets.folder.data_folder import DataFolder
from findrec.datasets.folder.splits import Int64Array
from findrec.models.base import Microbatch, Model
from findrec.training.build import build_catalogue, build_tower_model, data_facts, place_tables, table_shapes

MAX_MEASURED = 8192  # padded positions above which the memory of a microbatch is extrapolated
_MIN_EXAMPLES = 8  # fewest examples of a microbatch to extrapolate from
_FEWEST_MEASURED = 16  # examples of the larger part, where more than a half of them need not be measured


@dataclass(frozen=True)
class Plan:
    """The plan of a run on given machines."""

    config: RunConfig
    placed: list[tuple[Machine, int]]  # machines with their numbers of workers
    gpu: bool
    sizes: Sizes
    num_steps: int  # of the first epoch; others may differ by one
    num_targets: int
    padding: float
    shards: list[int]  # number of shards that each worker reads in the first epoch
    num_shards: int

    @property
    def gpu_memory(self) -> int | None:
        """Bytes of the smallest GPU that a worker gets; None if there is none or its size is unknown."""
        sizes = [machine.gpu_memory for machine, _ in self.placed]
        known = [size for size in sizes if size is not None]
        return min(known) if self.gpu and len(known) == len(sizes) else None

    @property
    def memory(self) -> WorkerMemory:
        """The memory of one worker."""
        return worker_memory(self.config, self.sizes, gpu=self.gpu, gpu_memory=self.gpu_memory)

    @property
    def evaluator_bytes(self) -> int:
        """Bytes of the asynchronous evaluator; 0 if there is none."""
        is_async = self.config.evaluation.evaluator == "async"
        return evaluator_memory(self.config, self.sizes) if is_async else 0

    def memory_at_stage(self, stage: int) -> WorkerMemory:
        """The memory of one worker at another ZeRO stage."""
        changed = {
            "zero_stage": stage,
            "offload_optimizer": self.config.cluster.offload_optimizer and stage > 0,
        }
        cluster = self.config.cluster.model_copy(update=changed)
        config = self.config.model_copy(update={"cluster": cluster})
        return worker_memory(config, self.sizes, gpu=self.gpu, gpu_memory=self.gpu_memory)


def make_plan(
    config: RunConfig, folder: DataFolder, machines: Sequence[Machine], *, announce: bool = False
) -> Plan:
    """Plan a run on `machines`; reads one microbatch and builds the model, but no tables.

    `announce` tells the user about GPUs as in `use_gpus`.
    """
    config, gpu = use_gpus(config, machines, announce=announce)
    workers = config.cluster.workers
    model = build_tower_model(config, folder)
    source: ExampleSource[Any] = model.examples(config, folder)
    epoch = source.plan(0)
    largest = max((part for step in epoch.steps for part in step), key=source.size)
    shape, activations = measure(config, folder, model, source, largest)
    sizes = Sizes(
        num_weights=sum(p.numel() for p in model.parameters()),
        tables=place_tables(config, folder, workers),
        num_items=folder.num_items,
        num_users=folder.num_users,
        num_windows=source.num_examples,
        feature_dims=data_facts(config, folder).feature_dims,
        shape=shape,
        activations=activations,
        feature_bytes=build_catalogue(config, folder).nbytes,
    )
    return Plan(
        config=config,
        placed=place_workers(config, machines, gpu=gpu),
        gpu=gpu,
        sizes=sizes,
        num_steps=len(epoch.steps),
        num_targets=int(epoch.targets.sum()),
        padding=epoch.padding,
        shards=[_num_shards(source, epoch, rank, workers) for rank in range(workers)],
        num_shards=len(folder.manifest.shards),
    )


def measure(
    config: RunConfig, folder: DataFolder, model: Model[Any], source: ExampleSource[Any], chosen: Int64Array
) -> tuple[MicrobatchShape, int]:
    """The shape of the microbatch of the examples `chosen`, and the bytes the model takes for it.

    For a large microbatch the bytes are extrapolated linearly from two parts of its examples, which do not
    depend on each other: from at most a half of them and half as many. For remote data, examples of equal
    sizes are generated instead of downloaded.
    """
    shapes = table_shapes(config, folder)
    catalogue = build_catalogue(config, folder)

    def run(part: Int64Array) -> tuple[MicrobatchShape, int]:
        examples = source.dummy_examples(part) if folder.remote else source.read(0, [part])[0]
        shape = shape_of(examples)
        microbatch = Microbatch(examples, catalogue, max(1, shape.targets), config.training.microbatches, 0)
        return shape, measure_microbatch(model, shapes, microbatch)

    model.train()
    size, count = source.size(chosen), len(chosen)
    if size <= MAX_MEASURED or count < _MIN_EXAMPLES:
        return run(chosen)
    # Examples are sorted by size, so every n-th is a representative sample that includes the largest.
    step = max(2, min(-(-size // MAX_MEASURED), count // _FEWEST_MEASURED))
    parts = [chosen[::step], chosen[:: 2 * step]]
    (_, larger), (part_shape, smaller) = run(parts[0]), run(parts[1])
    sizes = [source.size(part) for part in parts]
    slope = (larger - smaller) / max(1, sizes[0] - sizes[1])
    scale = size / sizes[1]
    shape = MicrobatchShape(
        rows=round(part_shape.rows * scale),
        length=part_shape.length,
        targets=round(part_shape.targets * scale),
        distinct=min(round(part_shape.distinct * scale), folder.num_items + 1),
    )
    return shape, round(larger + slope * (size - sizes[0]))


def shape_of(examples: Any) -> MicrobatchShape:
    """The sizes of a microbatch; other examples than histories count as histories of one event."""
    if isinstance(examples, Batch):
        rows, length = examples.item.shape
        return MicrobatchShape(rows, length, len(examples.target), len(examples.ids))
    count = max((len(x) for x in vars(examples).values() if isinstance(x, Tensor) and x.ndim), default=1)
    return MicrobatchShape(count, 1, count, count)


def _num_shards(source: ExampleSource[Any], epoch: EpochPlan, rank: int, world: int) -> int:
    mine = [part for step in epoch.steps for _, part in share(step, rank, world)]
    return source.num_shards(np.concatenate(mine))
