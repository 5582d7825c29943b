"""`--dry-run`: plans a run without starting it, and checks that it fits into memory.

The plan uses the same code as training for microbatches and models. Memory is an estimate
(`findrec.cluster.plan.memory`); a test compares it with measured peaks, which it meets within a factor of
1.5.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from torch import Tensor

from findrec.cluster.plan.activations import MicrobatchShape, measure_microbatch
from findrec.cluster.plan.machines import (
    Machine,
    cluster_machines,
    place_workers,
    this_machine,
    use_gpus,
)
from findrec.cluster.plan.memory import Sizes, WorkerMemory, evaluator_memory, worker_memory
from findrec.config import RunConfig, parse_config
from findrec.datasets.batches.batch import Batch
from findrec.datasets.batches.examples import ExampleSource
from findrec.datasets.batches.plan import EpochPlan, share
from findrec.datasets.folder.configured import data_folder_of, open_data_folder
from findrec.datasets.folder.data_folder import DataFolder
from findrec.datasets.folder.splits import Int64Array
from findrec.errors import FindRecError
from findrec.evaluation.check import check_run
from findrec.models.base import Microbatch, Model
from findrec.progress import say
from findrec.ray_session import ray_session
from findrec.training.build import build_catalogue, build_tower_model, data_facts, place_tables, table_shapes
from findrec.training.runs import training_jobs

# The processes of Ray and the driver on one machine.
RAY_BYTES = 1536 << 20
_STAGES = (0, 1, 2, 3)
MAX_MEASURED = 8192  # padded positions above which the memory of a microbatch is extrapolated
_MIN_EXAMPLES = 8  # fewest examples of a microbatch to extrapolate from


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
    def memory(self) -> WorkerMemory:
        """The memory of one worker."""
        return worker_memory(self.config, self.sizes, gpu=self.gpu)

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
        return worker_memory(self.config.model_copy(update={"cluster": cluster}), self.sizes, gpu=self.gpu)


def dry_run(config: RunConfig) -> None:
    """Print the plan of each training of a run.

    Raises `FindRecError` if `check_run` does, or if a training cannot be placed or does not fit.
    """
    folder = _open_prepared(config)
    check_run(config, folder)
    say(f"plan of run {config.name!r}: nothing is started")
    with _machines(config) as machines:
        for job in training_jobs(config, Path()):
            say(f"training of {job.name}")
            plan = make_plan(job.config, folder, machines, announce=True)
            for line in describe(plan):
                say(line)
            check_memory_fits(plan, folder, machines)
        unknown = plan.gpu and any(machine.gpu_memory is None for machine, _ in plan.placed)
    checked = "it fits, as far as is known: the memory of GPUs was not checked" if unknown else "it fits"
    say(f"{checked}; start it with the same command without --dry-run")


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

    For a large microbatch the bytes are extrapolated linearly from a quarter and a half of its examples,
    which do not depend on each other. For remote data, examples of equal sizes are generated instead of
    downloaded.
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
    (_, half), (quarter_shape, quarter) = run(chosen[::2]), run(chosen[::4])
    sizes = [source.size(chosen[::step]) for step in (2, 4)]
    slope = (half - quarter) / max(1, sizes[0] - sizes[1])
    scale = size / sizes[1]
    shape = MicrobatchShape(
        rows=round(quarter_shape.rows * scale),
        length=quarter_shape.length,
        targets=round(quarter_shape.targets * scale),
        distinct=min(round(quarter_shape.distinct * scale), folder.num_items + 1),
    )
    return shape, round(half + slope * (size - sizes[0]))


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


def describe(plan: Plan) -> Iterator[str]:
    """The plan as lines of text."""
    config, sizes = plan.config, plan.sizes
    training, cluster, shape = config.training, config.cluster, sizes.shape
    where = ", ".join(f"{count} on {machine.name}" for machine, count in plan.placed)
    kind = "a GPU each, nccl" if plan.gpu else "CPU, gloo"
    offload = ", optimizer in host memory" if cluster.offload_optimizer else ""
    least = f", at least {cluster.min_workers}" if cluster.min_workers else ""
    yield f"  workers     {cluster.workers} ({kind}): {where}{least}"
    yield f"  tower       {sizes.num_weights:,} parameters, ZeRO stage {cluster.zero_stage}{offload}"
    for name, table in sizes.tables.items():
        yield (
            f"  table       {name}: {table.num_rows * table.dim:,} parameters, {table.mode}, "
            f"{table.rows:,} rows per worker ({table.why})"
        )
    yield (
        f"  steps       {plan.num_steps:,} per epoch, {training.epochs * plan.num_steps:,} in total; a step "
        f"is {training.microbatches} microbatches, {training.microbatches // cluster.workers} per worker, "
        f"of up to {shape.positions:,} positions ({shape.rows} x {shape.length})"
    )
    yield f"  targets     {plan.num_targets:,} per epoch, {plan.padding:.1%} of positions are padding"
    read = sorted(set(plan.shards))
    span = f"{read[0]}" if len(read) == 1 else f"{read[0]} to {read[-1]}"
    yield f"  shards      {span} of {plan.num_shards} per worker and epoch (users are shuffled)"
    yield "  memory per worker"
    for part in plan.memory.parts:
        where = "  on the GPU" if plan.gpu and part.location == "device" else ""
        yield f"    {part.name:<22}{_mib(part.bytes):>12}{where}"
    yield f"    {'total':<22}{_mib(plan.memory.total('device', 'host')):>12}"
    stages = ", ".join(f"{s}: {_mib(plan.memory_at_stage(s).total('device', 'host'))}" for s in _STAGES)
    yield f"  by ZeRO stage  {stages}"
    if plan.evaluator_bytes:
        yield f"  evaluator   {_mib(plan.evaluator_bytes)}, on the driver's machine or a free GPU"
    for machine, count in plan.placed:
        used, has = _demand(plan, count), machine.memory
        line = f"  {machine.name}: {_gib(used)} of {_gib(has)} for {count} workers, Ray and the driver"
        if plan.gpu:
            has_gpu = "unknown, not checked" if machine.gpu_memory is None else _gib(machine.gpu_memory)
            line += f"; {_gib(plan.memory.total('device'))} on each GPU, of {has_gpu}"
        yield line


def check_memory_fits(plan: Plan, folder: DataFolder, machines: Sequence[Machine]) -> None:
    """Raise `FindRecError` if a machine has too little memory, with changes that would fit."""
    short = _shortage(plan)
    if short is None:
        return
    changes = "; ".join(_changes_that_fit(plan, folder, machines))
    advice = "No change of a single setting would fit: use machines with more memory, or more of them"
    if changes:
        advice = f"Any of these changes would fit: {changes}"
    raise FindRecError(f"this plan does not fit: {short}. {advice}.")


def _shortage(plan: Plan) -> str | None:
    for machine, count in plan.placed:
        used = _demand(plan, count)
        if used > machine.memory:
            return f"{machine.name} has {_gib(machine.memory)} of memory, {count} workers need {_gib(used)}"
        on_gpu = plan.memory.total("device")
        if plan.gpu and machine.gpu_memory is not None and machine.gpu_memory < on_gpu:
            return f"a GPU of {machine.name} has {_gib(machine.gpu_memory)}, a worker needs {_gib(on_gpu)}"
    return None


def _changes_that_fit(plan: Plan, folder: DataFolder, machines: Sequence[Machine]) -> Iterator[str]:
    """Overrides each of which makes the plan fit, beginning with those that do not change results."""
    training, cluster = plan.config.training, plan.config.cluster
    tried = [[f"cluster.zero_stage={stage}"] for stage in (2, 3) if stage > cluster.zero_stage]
    if plan.gpu and not cluster.offload_optimizer:
        tried.append([f"cluster.zero_stage={max(1, cluster.zero_stage)}", "cluster.offload_optimizer=true"])
    if cluster.workers > 1 and any(table.mode == "replicated" for table in plan.sizes.tables.values()):
        tried.append(["training.table=sharded"])
    if plan.evaluator_bytes:
        tried.append(["evaluation.evaluator=inline"])
    if not training.checkpoint_activations:
        tried.append(["training.checkpoint_activations=true"])
    fewer = [w for w in range(cluster.workers - 1, 0, -1) if training.microbatches % w == 0]
    tried += [[f"cluster.workers={w}"] for w in fewer]
    tokens = training.tokens // 2
    while tokens >= 64:
        tried.append([f"training.tokens={tokens}"])
        tokens //= 2
    if training.loss.kind == "exact":
        tried.append(["training.loss.kind=sampled"])
    fitting = set()
    for overrides in tried:
        key = overrides[-1].split("=")[0]
        if key in fitting:
            continue  # a smaller change of this setting is sufficient
        try:
            changed = parse_config(plan.config.model_dump(mode="json"), overrides)
            if _shortage(make_plan(changed, folder, machines)) is None:
                fitting.add(key)
                yield " ".join(overrides)
        except FindRecError:
            continue  # not possible with the rest of this configuration


def _demand(plan: Plan, count: int) -> int:
    """Bytes of host memory that `count` workers, Ray and the driver need on a machine.

    The evaluator is included if there is one machine; with several, it may be on any of them.
    """
    each = plan.memory.total("host") if plan.gpu else plan.memory.total("device", "host")
    return count * each + RAY_BYTES + (plan.evaluator_bytes if len(plan.placed) == 1 else 0)


def _open_prepared(config: RunConfig) -> DataFolder:
    """Open the data set; raises `FindRecError` if it is not prepared."""
    location = data_folder_of(config.data)
    if isinstance(location, Path) and not location.exists():
        raise FindRecError(
            f"there is no data set in {location}. Prepare it first: findrec prepare {config.data.recipe}"
        )
    return open_data_folder(config.data, verify=False)


@contextmanager
def _machines(config: RunConfig) -> Iterator[list[Machine]]:
    """This machine, or those of the cluster that the run would use."""
    if not (config.cluster.address or os.environ.get("RAY_ADDRESS")):
        yield [this_machine()]
        return
    with ray_session(config):
        yield cluster_machines()


def _mib(size: int) -> str:
    return f"{size / 2**20:,.1f} MiB"


def _gib(size: int) -> str:
    return f"{size / 2**30:.1f} GiB"
