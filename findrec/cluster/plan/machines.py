"""The machines of a cluster, and the number of workers placed on each."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path

import torch

from findrec.cluster.plan.placement import min_workers, shareable
from findrec.config import RunConfig
from findrec.errors import FindRecError
from findrec.nvidia import gpu_memory
from findrec.progress import say, warn
from findrec.ray_session import ray_session, usable_cpus, usable_gpus

_ANSWER_S = 60.0  # for the machines of a cluster to say the memory of their GPUs


@dataclass(frozen=True)
class Machine:
    """The resources of one machine; `gpu_memory` is that of its smallest GPU, None if unknown."""

    name: str
    cpus: float
    memory: int  # bytes
    gpus: int = 0
    gpu_memory: int | None = None  # bytes
    node: str = ""  # Ray's id of the machine


def this_machine() -> Machine:
    """The machine this process runs on."""
    gpus = usable_gpus()
    sizes = [torch.cuda.get_device_properties(gpu).total_memory for gpu in range(gpus)]
    return Machine("this machine", usable_cpus(), machine_memory(), gpus, min(sizes, default=None))


def machine_memory() -> int:
    """Bytes of memory of this machine, or the limit of this container."""
    limits = [os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")]
    for file in ("/sys/fs/cgroup/memory.max", "/sys/fs/cgroup/memory/memory.limit_in_bytes"):
        try:
            limits.append(int(Path(file).read_text()))
        except (OSError, ValueError):  # no such file, or "max"
            continue
    return min(limits)


def cluster_machines() -> list[Machine]:
    """The living nodes of the Ray cluster this process has joined; see `with_gpu_memory` for their GPUs."""
    import ray

    machines = []
    for node in ray.nodes():
        resources = node["Resources"]
        if node["Alive"]:
            # Ray reserves part of a node's memory for its object store, which a training hardly uses.
            memory = int(resources.get("memory", 0) + resources.get("object_store_memory", 0))
            name = str(node["NodeManagerAddress"])
            gpus, node_id = int(resources.get("GPU", 0)), str(node["NodeID"])
            machines.append(Machine(name, resources.get("CPU", 0), memory, gpus, node=node_id))
    return machines


def with_gpu_memory(machines: Sequence[Machine]) -> list[Machine]:
    """The machines of a Ray cluster with the memory of their GPUs, as far as they answer in time.

    Each is asked by a task that takes no resources, as all of its GPUs may be in use.
    """
    asked = [machine for machine in machines if machine.gpus and machine.gpu_memory is None and machine.node]
    if not asked:
        return list(machines)
    import ray
    from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

    ask = ray.remote(num_cpus=0, max_retries=0)(gpu_memory)
    answers = {
        machine.node: ask.options(
            scheduling_strategy=NodeAffinitySchedulingStrategy(machine.node, soft=False)
        ).remote()
        for machine in asked
    }
    ready, late = ray.wait(list(answers.values()), num_returns=len(answers), timeout=_ANSWER_S)
    for task in late:
        ray.cancel(task, force=True)
    known: dict[str, int | None] = {}
    for node, answer in answers.items():
        try:
            known[node] = ray.get(answer) if answer in ready else None
        except ray.exceptions.RayError:  # the machine was lost
            known[node] = None
    return [replace(m, gpu_memory=known[m.node]) if m.node in known else m for m in machines]


@contextmanager
def machines_of(config: RunConfig) -> Iterator[list[Machine]]:
    """This machine, or those of the cluster that a run would use."""
    if not (config.cluster.address or os.environ.get("RAY_ADDRESS")):
        yield [this_machine()]
        return
    with ray_session(config):
        yield with_gpu_memory(cluster_machines())


def place_workers(config: RunConfig, machines: Sequence[Machine], *, gpu: bool) -> list[tuple[Machine, int]]:
    """The machines that get workers, each with their number: as few machines as possible, the largest first.

    Ray packs workers in the same way where it can. Raises `FindRecError` if not all workers fit.
    """
    cpus_per_worker = config.cluster.cpus_per_worker

    def capacity(machine: Machine) -> int:
        by_cpu = int(machine.cpus / cpus_per_worker + 1e-9)
        return min(by_cpu, machine.gpus) if gpu else by_cpu

    left, placed = config.cluster.workers, []
    for machine in sorted(machines, key=capacity, reverse=True):
        num_workers = min(left, capacity(machine))
        if num_workers:
            placed.append((machine, num_workers))
            left -= num_workers
    if left:
        listed = "; ".join(f"{m.name}: {m.cpus:g} CPUs, {m.gpus} GPUs" for m in machines)
        raise FindRecError(
            f"{config.cluster.workers} workers with {cpus_per_worker:g} CPUs "
            f"{'and a GPU ' if gpu else ''}each do not fit on {listed}: {left} are left over. "
            "Lower cluster.workers or cluster.cpus_per_worker"
            f"{', or set cluster.gpu=false.' if gpu else '.'}"
        )
    return placed


def use_gpus(
    config: RunConfig, machines: Sequence[Machine], *, announce: bool = False
) -> tuple[RunConfig, bool]:
    """Decide whether each worker gets a GPU; returns the run, perhaps with fewer workers, and the decision.

    With `cluster.gpu=auto` workers get GPUs if `cluster.min_workers` of them exist. If there are some, but
    fewer than workers, and the number of workers is the default, it becomes that of the GPUs, or the next
    smaller one that divides the microbatches; results do not depend on it. With `announce` the user is told
    of every decision but the usual one. Raises `FindRecError` if GPUs are requested (`cluster.gpu=true`), but
    the installed PyTorch is a build for CPUs.
    """
    cluster, gpus = config.cluster, sum(machine.gpus for machine in machines)
    tell = warn if announce else _silent
    if cluster.gpu is False or (cluster.gpu == "auto" and not gpus):
        return config, False
    if not built_for_gpus():
        problem = "the installed PyTorch is the build for CPUs (`findrec doctor` says which one fits)"
        if cluster.gpu is True:
            raise FindRecError(f"cluster.gpu=true, but {problem}")
        tell(f"{gpus} GPUs are not used: {problem}")
        return config, False
    if gpus >= min_workers(config):
        return config, True
    if gpus and "workers" not in cluster.model_fields_set:
        workers = shareable(config, gpus)
        if announce:
            say(f"{workers} instead of {cluster.workers} workers, as there are {gpus} GPUs: one for each")
        return config.model_copy(update={"cluster": cluster.model_copy(update={"workers": workers})}), True
    if cluster.gpu is True:
        return config, True  # more may come; otherwise placing the workers fails
    least = shareable(config, gpus)
    tell(
        f"TRAINING ON THE CPU: {min_workers(config)} workers need a GPU each, and there are {gpus} in all. "
        f"Set cluster.workers={least} to train on a GPU each, with the same result, or cluster.gpu=false to "
        "train on the CPU without this warning"
    )
    return config, False


def built_for_gpus() -> bool:
    """Whether the installed PyTorch is a build with CUDA or ROCm; workers have the same one."""
    return torch.version.cuda is not None or torch.version.hip is not None


def _silent(_: str) -> None:
    pass
