"""How many workers there is room for, and how many of them can share a step."""

from __future__ import annotations

import time

from findrec.config import RunConfig
from findrec.errors import FindRecError
from findrec.progress import say

_LOOK_S = 1.0


def worker_resources(config: RunConfig, *, gpu: bool) -> dict[str, float]:
    """What one worker takes of a machine."""
    resources: dict[str, float] = {"CPU": config.cluster.cpus_per_worker}
    if gpu:
        resources["GPU"] = 1
    return resources


def room(config: RunConfig, *, gpu: bool, held: int = 0) -> int:
    """Workers that fit into what the machines of the cluster that stay have, and nobody else uses.

    `held` workers of our own are running now: their place counts as room.
    """
    import ray

    need = worker_resources(config, gpu=gpu)
    gone = leaving_machines()
    fit = sum(
        min(_times(node["Resources"].get(kind, 0), amount) for kind, amount in need.items())
        for node in ray.nodes()
        if node["Alive"] and node["NodeID"] not in gone
    )
    free = ray.available_resources()
    unused = min(_times(free.get(kind, 0), amount) for kind, amount in need.items())
    return min(fit, held + unused)


def leaving_machines() -> set[str]:
    """Ray's ids of the machines it has been told will be taken away (preempted, or scaled down)."""
    from ray._private.state import state  # Ray Train asks there too; there is nothing public

    return set(state.get_draining_nodes())


def _times(have: float, amount: float) -> int:
    return int(have / amount + 1e-9)  # 0.3 / 0.1 is 2.9999...


def shareable(config: RunConfig, limit: int) -> int:
    """The most workers, up to `limit` and `cluster.workers`, that divide a step's microbatches."""
    top = min(limit, config.cluster.workers)
    return next((n for n in range(top, 0, -1) if config.training.microbatches % n == 0), 0)


def least(config: RunConfig) -> int:
    """`cluster.min_workers`, by default all of them."""
    return config.cluster.min_workers or config.cluster.workers


def wait_for_room(config: RunConfig, *, gpu: bool, wait_s: float) -> int:
    """The number of workers to start with now, after waiting for the least of them `wait_s` at most.

    All that `cluster.workers` asks for are waited for as well while a machine may still be about to come
    (`cluster.wait_s`). Raises `FindRecError` when there is no room: Ray itself would wait without end.
    """
    deadline = time.monotonic() + wait_s
    asked = said = False
    while True:
        fit = room(config, gpu=gpu)
        workers = shareable(config, fit)
        late = time.monotonic() >= deadline
        if workers == config.cluster.workers or (late and workers >= least(config)):
            return workers
        if late:
            raise FindRecError(_no_room(config, fit, gpu))
        if config.cluster.wait_s and not asked:
            from ray.autoscaler.sdk import request_resources

            asked = True
            request_resources(bundles=[worker_resources(config, gpu=gpu)] * config.cluster.workers)
        if not said:
            said = True
            wanted = config.cluster.workers
            say(f"waiting up to {wait_s:.0f} s for room for {wanted} workers (there is for {fit})")
        time.sleep(_LOOK_S)


def _no_room(config: RunConfig, fit: int, gpu: bool) -> str:
    import ray

    have = ray.cluster_resources()
    one = worker_resources(config, gpu=gpu)
    need = " and ".join(f"{amount:g} {kind}" for kind, amount in one.items())
    has = ", ".join(f"{have.get(kind, 0):g} {kind}s" for kind in one)
    few = least(config)
    return (
        f"{few} worker{'s' * (few > 1)} with {need} each cannot be placed: the cluster has {has} in all, and "
        f"room for {fit} now. Lower cluster.workers, cluster.min_workers or cluster.cpus_per_worker, set "
        "cluster.gpu=auto, or wait for machines with cluster.wait_s."
    )
