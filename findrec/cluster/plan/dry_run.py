"""`--dry-run`: plans a run without starting it, and checks that it fits into memory."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path

from findrec.cluster.plan.machines import Machine, machines_of
from findrec.cluster.plan.memory import FEATURE_TABLES
from findrec.cluster.plan.plan import Plan, make_plan
from findrec.cluster.plan.tokens import resolve_tokens
from findrec.config import RunConfig, parse_config
from findrec.datasets.batches.catalogue import GPU_SHARE
from findrec.datasets.folder.configured import data_folder_of, open_data_folder
from findrec.datasets.folder.data_folder import DataFolder
from findrec.errors import FindRecError
from findrec.evaluation.check import check_run
from findrec.progress import say
from findrec.training.runs import training_jobs, with_saved_tokens

# The processes of Ray and the driver on one machine.
RAY_BYTES = 1536 << 20
_STAGES = (0, 1, 2, 3)


def dry_run(config: RunConfig) -> None:
    """Print the plan of each training of a run.

    Raises `FindRecError` if `check_run` does, or if a training cannot be placed or does not fit.
    """
    folder = _open_prepared(config)
    check_run(config, folder)
    say(f"plan of run {config.name!r}: nothing is started")
    with machines_of(config) as machines:
        config = resolve_tokens(with_saved_tokens(config), folder, machines)
        for job in training_jobs(config, Path()):
            say(f"training of {job.name}")
            plan = make_plan(job.config, folder, machines, announce=True)
            for line in describe(plan):
                say(line)
            check_memory_fits(plan, folder, machines)
        unknown = plan.gpu and any(machine.gpu_memory is None for machine, _ in plan.placed)
    checked = "it fits, as far as is known: the memory of GPUs was not checked" if unknown else "it fits"
    say(f"{checked}; start it with the same command without --dry-run")


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
    if plan.gpu and plan.sizes.feature_bytes:
        yield f"  features    {_mib(plan.sizes.feature_bytes)}, {_where_features_are(plan)}"
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


def _where_features_are(plan: Plan) -> str:
    if plan.gpu_memory is None:
        return "kept on the GPUs if they fit; counted, as their memory is unknown"
    if any(part.name == FEATURE_TABLES for part in plan.memory.parts):
        return "kept on the GPUs after the first step"
    return (
        f"read from host memory for every microbatch: more than {GPU_SHARE:.0%} of what the rest leaves free "
        "on a GPU"
    )


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
    tokens = training.num_tokens // 2
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


def _mib(size: int) -> str:
    return f"{size / 2**20:,.1f} MiB"


def _gib(size: int) -> str:
    return f"{size / 2**30:.1f} GiB"
