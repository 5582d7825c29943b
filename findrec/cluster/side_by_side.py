"""Runs of several processes side by side on one Ray cluster, each started when there is room for it."""

from __future__ import annotations

import os
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

from findrec.cluster.plan.machines import cluster_machines, use_gpus
from findrec.cluster.plan.placement import draining_machines, fitting_workers
from findrec.config import RunConfig
from findrec.ray_session import ray_session, worker_threads

_ADDRESS = "RAY_ADDRESS"


class ClusterRoom:
    """The room of the cluster that this process has joined, and what is reserved of it.

    Ray knows the resources of workers only once they are placed, some time after their process has started.
    So they are reserved here from its start to its end. A worker needs its GPU, or as many CPU cores as it
    has threads.
    """

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._reserved: dict[str, dict[str, float]] = {}  # resources by the name of the run

    def reserve(self, run: str, config: RunConfig) -> bool:
        """Reserve the workers of a run until `release`; False if there is no room for them now.

        A run that is alone always gets its reservation: if it does not fit, its own error says what is
        missing.
        """
        with self._lock:
            placed, gpu = use_gpus(config, cluster_machines())
            need = _resources(placed, gpu=gpu)
            if self._reserved:
                total = _total_resources()
                used = {kind: sum(one.get(kind, 0) for one in self._reserved.values()) for kind in need}
                if any(used[kind] + amount > total.get(kind, 0) + 1e-9 for kind, amount in need.items()):
                    return False
                if fitting_workers(placed, gpu=gpu) < placed.cluster.workers:  # taken by others
                    return False
            self._reserved[run] = need
            return True

    def release(self, run: str) -> None:
        """Give back what a run has reserved."""
        with self._lock:
            self._reserved.pop(run, None)


def _resources(config: RunConfig, *, gpu: bool) -> dict[str, float]:
    """What all workers of a run use."""
    cluster = config.cluster
    cpus = cluster.cpus_per_worker if gpu else max(cluster.cpus_per_worker, worker_threads(config))
    need = {"CPU": cpus * cluster.workers}
    if gpu:
        need["GPU"] = float(cluster.workers)
    return need


def _total_resources() -> dict[str, float]:
    import ray

    draining = draining_machines()
    total: dict[str, float] = {}
    for node in ray.nodes():
        if node["Alive"] and node["NodeID"] not in draining:
            for kind, amount in node["Resources"].items():
                total[kind] = total.get(kind, 0) + amount
    return total


@contextmanager
def shared_cluster(configs: Sequence[RunConfig]) -> Iterator[ClusterRoom | None]:
    """Join the cluster of the runs, or start one on this machine, for all processes started inside.

    Yields its room; None if the runs name different clusters. Then each process joins its own, and its room
    is not known here. Raises `FindRecError` if the cluster does not answer.
    """
    if len({config.cluster.address for config in configs}) != 1:
        yield None
        return
    with ray_session(configs[0]):
        import ray

        before = os.environ.get(_ADDRESS)
        os.environ[_ADDRESS] = ray.get_runtime_context().gcs_address  # of the processes started inside
        try:
            yield ClusterRoom()
        finally:
            if before is None:
                del os.environ[_ADDRESS]
            else:
                os.environ[_ADDRESS] = before
