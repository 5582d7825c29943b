"""The machines of a cluster, and the number of workers placed on each."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from findrec.cluster.plan.placement import min_workers
from findrec.config import RunConfig
from findrec.errors import FindRecError
from findrec.ray_session import usable_cpus


@dataclass(frozen=True)
class Machine:
    """The resources of one machine; `gpu_memory` is that of one GPU, 0 if unknown."""

    name: str
    cpus: float
    memory: int  # bytes
    gpus: int = 0
    gpu_memory: int = 0  # bytes


def this_machine() -> Machine:
    """The machine this process runs on."""
    gpus = torch.cuda.device_count()
    gpu_memory = torch.cuda.get_device_properties(0).total_memory if gpus else 0
    return Machine("this machine", usable_cpus(), machine_memory(), gpus, gpu_memory)


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
    """The living nodes of the Ray cluster this process has joined."""
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


def has_gpus(config: RunConfig, machines: Sequence[Machine]) -> bool:
    """Whether each worker gets a GPU; with `cluster.gpu=auto`, if `cluster.min_workers` GPUs exist."""
    if config.cluster.gpu == "auto":
        return sum(machine.gpus for machine in machines) >= min_workers(config)
    return config.cluster.gpu
