"""Computes how many workers fit into the Ray cluster and how many of them can share a step."""

from __future__ import annotations

import time

from findrec.config import RunConfig
from findrec.errors import FindRecError
from findrec.progress import say

_POLL_S = 1.0


def worker_resources(config: RunConfig, *, gpu: bool) -> dict[str, float]:
    """The Ray resources of one worker."""
    resources: dict[str, float] = {"CPU": config.cluster.cpus_per_worker}
    if gpu:
        resources["GPU"] = 1
    return resources


def fitting_workers(config: RunConfig, *, gpu: bool, running: int = 0) -> int:
    """The number of workers that fit into the unused resources of the cluster.

    Machines that are being drained are left out. The resources of this run's own `running` workers count as
    unused.
    """
    import ray

    need = worker_resources(config, gpu=gpu)
    draining = draining_machines()
    fit = sum(
        min(_times(node["Resources"].get(kind, 0), amount) for kind, amount in need.items())
        for node in ray.nodes()
        if node["Alive"] and node["NodeID"] not in draining
    )
    free = ray.available_resources()
    unused = min(_times(free.get(kind, 0), amount) for kind, amount in need.items())
    return min(fit, running + unused)


def draining_machines() -> set[str]:
    """Ray's ids of the nodes that are being drained (preempted, or scaled down)."""
    from ray._private.state import state  # as Ray Train does; there is no public interface

    return set(state.get_draining_nodes())


def _times(available: float, amount: float) -> int:
    return int(available / amount + 1e-9)  # 0.3 / 0.1 is 2.9999...


def shareable(config: RunConfig, limit: int) -> int:
    """The largest number of workers, up to `limit` and `cluster.workers`, that divides the microbatches."""
    largest = min(limit, config.cluster.workers)
    return next((n for n in range(largest, 0, -1) if config.training.microbatches % n == 0), 0)


def min_workers(config: RunConfig) -> int:
    """`cluster.min_workers`, by default `cluster.workers`."""
    return config.cluster.min_workers or config.cluster.workers


def wait_for_room(config: RunConfig, *, gpu: bool, wait_s: float) -> int:
    """Wait until the workers fit, `wait_s` seconds at most; returns the number of workers to start.

    Until then it waits for room for all `cluster.workers`, afterwards `cluster.min_workers` are enough. With
    `cluster.wait_s` it asks Ray's autoscaler for machines. Raises `FindRecError` if there is no room at the
    end; Ray itself would wait forever.
    """
    deadline = time.monotonic() + wait_s
    scaling_requested = announced = False
    while True:
        fit = fitting_workers(config, gpu=gpu)
        workers = shareable(config, fit)
        expired = time.monotonic() >= deadline
        if workers == config.cluster.workers or (expired and workers >= min_workers(config)):
            return workers
        if expired:
            raise FindRecError(_no_room(config, fit, gpu))
        if config.cluster.wait_s and not scaling_requested:
            from ray.autoscaler.sdk import request_resources

            scaling_requested = True
            request_resources(bundles=[worker_resources(config, gpu=gpu)] * config.cluster.workers)
        if not announced:
            announced = True
            wanted = config.cluster.workers
            say(f"waiting up to {wait_s:.0f} s for room for {wanted} workers (there is for {fit})")
        time.sleep(_POLL_S)


def _no_room(config: RunConfig, fit: int, gpu: bool) -> str:
    import ray

    total = ray.cluster_resources()
    per_worker = worker_resources(config, gpu=gpu)
    need = " and ".join(f"{amount:g} {kind}" for kind, amount in per_worker.items())
    has = ", ".join(f"{total.get(kind, 0):g} {kind}s" for kind in per_worker)
    num_workers = min_workers(config)
    return (
        f"{num_workers} worker{'s' * (num_workers > 1)} with {need} each cannot be placed: the cluster has "
        f"{has} in all, and room for {fit} now. Lower cluster.workers, cluster.min_workers or "
        "cluster.cpus_per_worker, set cluster.gpu=auto, or wait for machines with cluster.wait_s."
    )
