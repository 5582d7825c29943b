"""`--dry-run`: what a run would place, read and keep in memory; nothing is started.

The plan is made of the same parts as the training: the epoch's microbatches, the network, the configuration
DeepSpeed is given. Memory is an estimate (`findrec.cluster.memory_plan`), held against measured peaks in a
test: to within a factor of 1.5 for a worker.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from findrec.cluster.activations import MicrobatchShape, activation_bytes, own_items_bytes
from findrec.cluster.launch import ray_session
from findrec.cluster.machines import (
    Machine,
    cluster_machines,
    has_gpus,
    place_workers,
    this_machine,
)
from findrec.cluster.memory_plan import Need, Sizes, evaluator_memory, worker_memory
from findrec.config import RunConfig, parse_config
from findrec.datasets.folder import DataFolder
from findrec.datasets.plan import EpochPlan, Windows, plan_epoch, share
from findrec.datasets.prepare import data_folder_of, open_data_folder
from findrec.errors import FindRecError
from findrec.progress import say
from findrec.training.build import build_tower_model, build_windows, table_placement, used_modalities

# Of Ray's own processes and the one that was started by hand, on the machine where both are.
RAY_BYTES = 1536 << 20
_STAGES = (0, 1, 2, 3)


@dataclass(frozen=True)
class Plan:
    """What a run comes to on given machines."""

    config: RunConfig
    placed: list[tuple[Machine, int]]  # machines and how many workers they get
    gpu: bool
    sizes: Sizes
    num_steps: int  # of the first epoch; others differ by a step at most
    num_targets: int
    padding: float
    shards: list[int]  # that each worker reads in the first epoch
    num_shards: int

    @property
    def need(self) -> Need:
        """Memory of one worker."""
        return worker_memory(self.config, self.sizes, gpu=self.gpu)

    @property
    def beside(self) -> int:
        """Memory of the evaluator beside training; 0 where there is none."""
        beside = self.config.evaluation.evaluator == "async"
        return evaluator_memory(self.config, self.sizes) if beside else 0

    def at_stage(self, stage: int) -> Need:
        """The same at another ZeRO stage."""
        changed = {
            "zero_stage": stage,
            "offload_optimizer": self.config.cluster.offload_optimizer and stage > 0,
        }
        cluster = self.config.cluster.model_copy(update=changed)
        return worker_memory(self.config.model_copy(update={"cluster": cluster}), self.sizes, gpu=self.gpu)


def dry_run(config: RunConfig) -> None:
    """Print the plan of a run; raises `FindRecError` where it cannot be placed or does not fit."""
    folder = _open_prepared(config)
    with _machines(config) as machines:
        plan = make_plan(config, folder, machines)
    for line in describe(plan):
        say(line)
    refuse_what_does_not_fit(plan, folder, machines)
    say("it fits; start it with the same command without --dry-run")


def make_plan(config: RunConfig, folder: DataFolder, machines: Sequence[Machine]) -> Plan:
    """Plan a run on `machines`; reads the data's tables and one microbatch, allocates the tower alone."""
    training, workers = config.training, config.cluster.workers
    gpu = has_gpus(config, machines)
    windows = build_windows(config, folder)
    epoch = plan_epoch(
        windows, seed=training.seed, epoch=0, microbatches=training.microbatches, tokens=training.tokens
    )
    dims = {name: folder.feature(name).dim for name in used_modalities(config, folder)}
    sizes = Sizes(
        num_weights=sum(p.numel() for p in build_tower_model(config, folder).parameters()),
        table=table_placement(config, folder, workers),
        num_items=folder.num_items,
        num_users=folder.num_users,
        num_windows=len(windows),
        feature_dims=dims,
        shape=largest_microbatch(config, dims, folder, windows, epoch),
    )
    return Plan(
        config=config,
        placed=place_workers(config, machines, gpu=gpu),
        gpu=gpu,
        sizes=sizes,
        num_steps=len(epoch.steps),
        num_targets=int(epoch.targets.sum()),
        padding=epoch.padding,
        shards=[_num_shards(folder, windows, epoch, rank, workers) for rank in range(workers)],
        num_shards=len(folder.manifest.shards),
    )


def largest_microbatch(
    config: RunConfig, dims: dict[str, int], folder: DataFolder, windows: Windows, epoch: EpochPlan
) -> MicrobatchShape:
    """The microbatch of an epoch that takes most memory. Its distinct items are counted where the histories
    lie on this machine; of an address no shard is fetched, and as many as could be are taken.
    """
    inputs, targets = windows.inputs, windows.targets
    largest, part = None, None
    for step in epoch.steps:
        for one in step:
            # All inputs and the last targets distinct: the most there can be.
            most = min(int(inputs[one].sum()) + len(one), folder.num_items) + 1
            shape = MicrobatchShape(len(one), int(inputs[one].max()), int(targets[one].sum()), most)
            size = activation_bytes(config, dims, shape) + own_items_bytes(config, shape)
            if largest is None or size > largest[0]:
                largest, part = (size, shape), one
    assert largest is not None
    assert part is not None
    if folder.remote:
        return largest[1]
    events = folder.histories(windows.user[part], windows.start[part], windows.stop[part])
    return replace(largest[1], distinct=len(np.unique(events.item)) + 1)


def _num_shards(folder: DataFolder, windows: Windows, epoch: EpochPlan, rank: int, world: int) -> int:
    mine = [part for step in epoch.steps for _, part in share(step, rank, world)]
    return folder.num_shards_of(windows.user[np.concatenate(mine)])


def describe(plan: Plan) -> Iterator[str]:
    """The plan in lines for people."""
    config, sizes = plan.config, plan.sizes
    training, cluster, shape = config.training, config.cluster, sizes.shape
    yield f"plan of run {config.name!r}: nothing is started"
    where = ", ".join(f"{count} on {machine.name}" for machine, count in plan.placed)
    kind = "a GPU each, nccl" if plan.gpu else "CPU, gloo"
    offload = ", its optimizer in the machine's memory" if cluster.offload_optimizer else ""
    least = f", goes on with {cluster.min_workers} at least" if cluster.min_workers else ""
    yield f"  workers     {cluster.workers} ({kind}): {where}{least}"
    yield (
        f"  parameters  {sizes.num_weights:,} in the tower (ZeRO stage {cluster.zero_stage}{offload}), "
        f"{sizes.num_items * config.model.dim:,} in the item table"
    )
    yield f"  item table  {sizes.table.mode}, {sizes.table.rows:,} rows a worker: {sizes.table.why}"
    yield (
        f"  steps       {plan.num_steps:,} an epoch, {training.epochs * plan.num_steps:,} in all; a step is "
        f"{training.microbatches} microbatches, {training.microbatches // cluster.workers} a worker, "
        f"of up to {shape.positions:,} positions ({shape.rows} x {shape.length})"
    )
    yield f"  targets     {plan.num_targets:,} an epoch, {plan.padding:.1%} of positions are padding"
    read = sorted(set(plan.shards))
    span = f"{read[0]}" if len(read) == 1 else f"{read[0]} to {read[-1]}"
    yield f"  shards      {span} of {plan.num_shards} a worker and epoch: users are shuffled over all of them"
    yield "  memory of a worker"
    for part in plan.need.parts:
        where = "  on the GPU" if plan.gpu and part.place == "device" else ""
        yield f"    {part.name:<22}{_mib(part.bytes):>12}{where}"
    yield f"    {'in all':<22}{_mib(plan.need.total('device', 'host')):>12}"
    stages = ", ".join(f"{s}: {_mib(plan.at_stage(s).total('device', 'host'))}" for s in _STAGES)
    yield f"  by ZeRO stage  {stages}"
    if plan.beside:
        yield f"  evaluator   {_mib(plan.beside)}, on the driver's machine or a GPU that is left over"
    for machine, count in plan.placed:
        used, has = _demand(plan, count), machine.memory
        line = f"  {machine.name}: {_gib(used)} of {_gib(has)} for {count} workers, Ray and the driver"
        if plan.gpu and machine.gpu_memory:
            line += f"; {_gib(plan.need.total('device'))} of {_gib(machine.gpu_memory)} on each GPU"
        yield line


def refuse_what_does_not_fit(plan: Plan, folder: DataFolder, machines: Sequence[Machine]) -> None:
    """Raise `FindRecError` where a machine has too little memory, with the changes that would fit."""
    short = _shortage(plan)
    if short is None:
        return
    would = list(_what_would_fit(plan, folder, machines))
    mend = (
        "Any of these would fit: " + "; ".join(would)
        if would
        else "No single setting mends that: take machines with more memory, or more of them"
    )
    raise FindRecError(f"this plan does not fit: {short}. {mend}.")


def _shortage(plan: Plan) -> str | None:
    for machine, count in plan.placed:
        used = _demand(plan, count)
        if used > machine.memory:
            return f"{machine.name} has {_gib(machine.memory)} of memory, {count} workers need {_gib(used)}"
        on_gpu = plan.need.total("device")
        if plan.gpu and 0 < machine.gpu_memory < on_gpu:
            return f"a GPU of {machine.name} has {_gib(machine.gpu_memory)}, a worker needs {_gib(on_gpu)}"
    return None


def _what_would_fit(plan: Plan, folder: DataFolder, machines: Sequence[Machine]) -> Iterator[str]:
    """Overrides that make the plan fit, each for itself; those that keep the results come first."""
    training, cluster = plan.config.training, plan.config.cluster
    tried = [[f"cluster.zero_stage={stage}"] for stage in (2, 3) if stage > cluster.zero_stage]
    if plan.gpu and not cluster.offload_optimizer:
        tried.append([f"cluster.zero_stage={max(1, cluster.zero_stage)}", "cluster.offload_optimizer=true"])
    if plan.sizes.table.mode == "replicated" and cluster.workers > 1:
        tried.append(["training.table=sharded"])
    if plan.beside:
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
    found = set()
    for overrides in tried:
        key = overrides[-1].split("=")[0]
        if key in found:
            continue  # a smaller change of this setting is enough
        try:
            changed = parse_config(plan.config.model_dump(mode="json"), overrides)
            if _shortage(make_plan(changed, folder, machines)) is None:
                found.add(key)
                yield " ".join(overrides)
        except FindRecError:
            continue  # not to be had with the rest of this configuration


def _demand(plan: Plan, count: int) -> int:
    """Bytes of a machine's own memory that `count` workers and the driver need, with the evaluator where all
    of them are on one machine (else the driver's may be any).
    """
    each = plan.need.total("host") if plan.gpu else plan.need.total("device", "host")
    return count * each + RAY_BYTES + (plan.beside if len(plan.placed) == 1 else 0)


def _open_prepared(config: RunConfig) -> DataFolder:
    """The data set, which must be there: to prepare it would start something."""
    place = data_folder_of(config.data)
    if isinstance(place, Path) and not place.exists():
        raise FindRecError(
            f"there is no data set in {place} to plan with. Make it first: "
            f"findrec prepare {config.data.recipe}"
        )
    return open_data_folder(config.data, verify=False)


@contextmanager
def _machines(config: RunConfig) -> Iterator[list[Machine]]:
    """This machine, or those of the cluster that the run would join."""
    if not (config.cluster.address or os.environ.get("RAY_ADDRESS")):
        yield [this_machine()]
        return
    with ray_session(config):
        yield cluster_machines()


def _mib(size: int) -> str:
    return f"{size / 2**20:,.1f} MiB"


def _gib(size: int) -> str:
    return f"{size / 2**30:.1f} GiB"
