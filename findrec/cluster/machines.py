"""The machines a run may use, and how many of its workers go where."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from findrec.cluster.launch import usable_cpus
from findrec.cluster.placement import least
from findrec.config import RunConfig
from findrec.errors import FindRecError


@dataclass(frozen=True)
class Machine:
    """What one machine offers; `gpu_memory` is that of one GPU, 0 where it is not known."""

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
    """Bytes this machine has, or this container may use where it is limited."""
    limits = [os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")]
    for file in ("/sys/fs/cgroup/memory.max", "/sys/fs/cgroup/memory/memory.limit_in_bytes"):
        try:
            limits.append(int(Path(file).read_text()))
        except (OSError, ValueError):  # not there, or "max"
            continue
    return min(limits)


def cluster_machines() -> list[Machine]:
    """The living nodes of the Ray cluster this process has joined."""
    import ray

    found = []
    for node in ray.nodes():
        have = node["Resources"]
        if node["Alive"]:
            # Ray sets a part of a node's memory aside for objects, which a training hardly uses.
            memory = int(have.get("memory", 0) + have.get("object_store_memory", 0))
            name = str(node["NodeManagerAddress"])
            found.append(Machine(name, have.get("CPU", 0), memory, int(have.get("GPU", 0))))
    return found


def place_workers(config: RunConfig, machines: Sequence[Machine], *, gpu: bool) -> list[tuple[Machine, int]]:
    """Workers on each machine that gets some: as few machines as will do, those with most room first.

    Ray packs them so too where it can. Raises `FindRecError` where there is not room for all.
    """
    need = config.cluster.cpus_per_worker

    def room(machine: Machine) -> int:
        by_cpu = int(machine.cpus / need + 1e-9)
        return min(by_cpu, machine.gpus) if gpu else by_cpu

    left, placed = config.cluster.workers, []
    for machine in sorted(machines, key=room, reverse=True):
        here = min(left, room(machine))
        if here:
            placed.append((machine, here))
            left -= here
    if left:
        listed = "; ".join(f"{m.name}: {m.cpus:g} CPUs, {m.gpus} GPUs" for m in machines)
        raise FindRecError(
            f"{config.cluster.workers} workers with {need:g} CPUs {'and a GPU ' if gpu else ''}each do not "
            f"fit on {listed}: {left} are left over. Lower cluster.workers or cluster.cpus_per_worker"
            f"{', or set cluster.gpu=false.' if gpu else '.'}"
        )
    return placed


def has_gpus(config: RunConfig, machines: Sequence[Machine]) -> bool:
    """Whether workers get a GPU each: as configured; `auto` where there are enough for the least of them."""
    if config.cluster.gpu == "auto":
        return sum(machine.gpus for machine in machines) >= least(config)
    return config.cluster.gpu
