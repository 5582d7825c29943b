"""The machines of a cluster, and the number of workers placed on each."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from findrec.cluster.plan.placement import min_workers, shareable
from findrec.config import RunConfig
from findrec.errors import FindRecError
from findrec.progress import say, warn
from findrec.ray_session import usable_cpus, usable_gpus


@dataclass(frozen=True)
class Machine:
    """The resources of one machine; `gpu_memory` is that of its smallest GPU, None if unknown."""

    name: str
    cpus: float
    memory: int  # bytes
    gpus: int = 0
    gpu_memory: int | None = None  # bytes


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
    """The living nodes of the Ray cluster this process has joined; Ray does not tell the memory of GPUs."""
    import ray

    machines = []
    for node in ray.nodes():
        resources = node["Resources"]
        if node["Alive"]:
            # Ray reserves part of a node's memory for its object store, which a training hardly uses.
            memory = int(resources.get("memory", 0) + resources.get("object_store_memory", 0))
            name = str(node["NodeManagerAddress"])
            machines.append(Machine(name, resources.get("CPU", 0), memory, int(resources.get("GPU", 0))))
    return machines


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
