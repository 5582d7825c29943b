"""Ray: join a cluster or start one here."""

from __future__ import annotations

import logging
import os
import socket
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from findrec.config import RunConfig
from findrec.errors import FindRecError
from findrec.paths import home
from findrec.progress import say

_RAY_SWITCHES = {
    "RAY_TRAIN_V2_ENABLED": "1",
    "RAY_TRAIN_ENABLE_PRINT_PATCH": "0",  # it prints every line of a worker twice
    "RAY_TRAIN_ENABLE_PREEMPTION_WATCHER": "0",
    "RAY_TRAIN_WORKER_GROUP_START_TIMEOUT_S": "60",
    "RAY_TRAIN_HEALTH_CHECK_INTERVAL_S": "0.25",  # a report waits for the next check: 2 s an epoch else
    "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0",  # Ray's own wish, or it warns in every process
    "RAY_COLOR_PREFIX": "0",
}


def usable_cpus() -> int:
    """CPU cores this process may run on."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 0


def worker_threads(config: RunConfig) -> int:
    """CPU threads of each worker: as configured, else the cores shared out evenly."""
    return config.cluster.threads or max(1, usable_cpus() // config.cluster.workers)


@contextmanager
def ray_session(config: RunConfig) -> Iterator[None]:
    """A Ray cluster for a run: the one at `cluster.address` or `RAY_ADDRESS`, else a local one. A process
    that is in a cluster already, such as a Ray actor, stays there.
    """
    os.environ.update(_RAY_SWITCHES)
    import ray

    if ray.is_initialized():
        yield
        return
    address = config.cluster.address or os.environ.get("RAY_ADDRESS")
    environment = {
        "FINDREC_HOME": str(home()),
        **_RAY_SWITCHES,
        "OMP_NUM_THREADS": str(worker_threads(config)),
        "PYTHONWARNINGS": "ignore::FutureWarning,ignore::UserWarning",
    }
    common: dict[str, Any] = {
        "runtime_env": {"env_vars": environment},
        "logging_level": logging.WARNING,
        "ignore_reinit_error": False,
    }
    if address:
        say(f"joining the Ray cluster at {address}")
        if _is_host_and_port(address):
            _refuse_dead_address(address)
            environment["RAY_ADDRESS"] = address  # or Ray Train's helpers look for "the" cluster, see below
        try:
            ray.init(address=address, **common)
        except ConnectionError as error:
            raise FindRecError(
                f"{str(error).splitlines()[0]}. If it asks for a token, it does not accept the token of this "
                "shell: give it with RAY_AUTH_MODE=token and RAY_AUTH_TOKEN_PATH=FILE."
            ) from error
    else:
        cores = usable_cpus()
        say(f"starting Ray on this machine ({cores} CPU cores)")
        # The token stays with the run: one in ~/.ray would switch authentication on for later clusters.
        os.environ.setdefault("RAY_AUTH_MODE", "disabled")
        # Ray's own 15 is for machines that it shares with its daemons: here any other program would starve
        # the training.
        os.environ.setdefault("RAY_worker_niceness", "0")
        # Ray Train's helpers look for "the" cluster of this machine and may find another one, or one that was
        # killed and left its address behind: all processes are told which one is theirs.
        port = _free_port()
        os.environ["RAY_GCS_SERVER_PORT"] = str(port)
        environment["RAY_ADDRESS"] = f"{ray.util.get_node_ip_address()}:{port}"
        # The dashboard also serves the state API by which Ray Train cleans up after itself.
        local = {"include_dashboard": True, "dashboard_host": "127.0.0.1"}
        # "local": not some other cluster that happens to run on this machine.
        ray.init(address="local", num_cpus=cores, **local, **common)
    try:
        yield
    finally:
        ray.shutdown()


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("", 0))
        port: int = probe.getsockname()[1]
        return port


def _is_host_and_port(address: str) -> bool:
    """Neither "auto", nor "local", nor ray://..."""
    host, _, port = address.rpartition(":")
    return bool(host) and "/" not in host and port.isdigit()


def _refuse_dead_address(address: str) -> None:
    """Ray itself would try a dead `host:port` for many minutes before it says so."""
    host, _, port = address.rpartition(":")
    try:
        socket.create_connection((host, int(port)), timeout=10).close()
    except OSError as error:
        raise FindRecError(
            f"no Ray cluster answers at {address!r} ({error}). Start one with `ray start --head`, or "
            "unset cluster.address and RAY_ADDRESS to run on this machine alone."
        ) from None
