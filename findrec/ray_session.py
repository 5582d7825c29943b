"""Starts a local Ray cluster for a run, or connects to an existing one."""

from __future__ import annotations

import logging
import os
import socket
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any
from urllib.parse import urlsplit

from findrec.config import RunConfig
from findrec.errors import FindRecError
from findrec.local_cluster import local_cluster, ray_errors
from findrec.nvidia import find_driver
from findrec.paths import home
from findrec.progress import say, warn

_RAY_SWITCHES = {
    "RAY_TRAIN_V2_ENABLED": "1",
    "RAY_TRAIN_ENABLE_PRINT_PATCH": "0",  # it would print every line of a worker twice
    "RAY_TRAIN_ENABLE_PREEMPTION_WATCHER": "0",
    "RAY_TRAIN_WORKER_GROUP_START_TIMEOUT_S": "60",
    "RAY_TRAIN_HEALTH_CHECK_INTERVAL_S": "0.25",  # reports wait for a check; the default costs 2 s per epoch
    "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0",  # as Ray recommends; otherwise it warns in every process
    "RAY_COLOR_PREFIX": "0",
}
_JOIN_HINT = (
    "Start a cluster with `ray start --head`, or unset cluster.address and RAY_ADDRESS to run on this "
    "machine alone. If it asks for a token, it does not accept the token of this shell: give it with "
    "RAY_AUTH_MODE=token and RAY_AUTH_TOKEN_PATH=FILE."
)


def usable_cpus() -> int:
    """CPU cores this process may run on."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 0


def usable_gpus() -> int:
    """GPUs that PyTorch can use here: none where the driver is too old or the build is for CPUs."""
    import torch

    # The count alone comes from the driver, which also counts where CUDA cannot start.
    return torch.cuda.device_count() if torch.cuda.is_available() else 0


def worker_threads(config: RunConfig) -> int:
    """CPU threads per worker: as configured, else the cores divided evenly among the workers."""
    return config.cluster.threads or max(1, usable_cpus() // config.cluster.workers)


@contextmanager
def ray_session(config: RunConfig) -> Iterator[None]:
    """Connect to the Ray cluster at `cluster.address` or `RAY_ADDRESS`, else start a local one.

    A process that is already connected, such as a Ray actor, stays in its cluster. Raises `FindRecError` if
    the cluster does not answer.
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
    if address in (None, "", "local"):
        cores = usable_cpus()
        say(f"starting Ray on this machine ({cores} CPU cores)")
        gpus = usable_gpus()
        if not gpus and config.cluster.gpu is not False:
            _warn_of_unusable_gpus()
        # Ray would count GPUs that PyTorch cannot use.
        session = local_cluster(cores, environment, num_gpus=gpus, **common)
    else:
        session = _joined_cluster(address, environment, **common)
    with session:
        yield


def _warn_of_unusable_gpus() -> None:
    driver = find_driver()
    if driver is not None and driver.gpus and os.environ.get("CUDA_VISIBLE_DEVICES") not in ("", "-1"):
        warn(
            f"{driver.gpus[0]} is not used: the installed PyTorch finds no usable GPU (driver "
            f"{driver.version}). `findrec doctor` says why; cluster.gpu=false hides this warning"
        )


@contextmanager
def _joined_cluster(address: str, environment: dict[str, str], **options: Any) -> Iterator[None]:
    """Join the cluster at an address as `ray.init` takes it; access is as this process's environment says."""
    import ray

    say(f"joining the Ray cluster at {address}")
    with ray_errors(f"cannot join the Ray cluster at {address!r}", _JOIN_HINT):
        if address == "auto":
            address = _running_cluster()
        if address.startswith(("http://", "https://")):
            raise FindRecError(
                f"{address!r} is the address of Ray's dashboard, for `ray job submit --address=...`. To join "
                "the cluster itself set cluster.address or RAY_ADDRESS to "
                f"{urlsplit(address).hostname}:6379, or unset them to run on this machine alone."
            )
        if _is_host_and_port(address):
            _refuse_dead_address(address)
            # Without it Ray Train's helpers may find another cluster, see `local_cluster`.
            environment["RAY_ADDRESS"] = address
        elif "://" not in address:
            raise FindRecError(
                f"{address!r} is no address of a Ray cluster: use host:port, for example head:6379"
            )
        ray.init(address=address, **options)
    try:
        yield
    finally:
        ray.shutdown()


def _running_cluster() -> str:
    """`host:port` of the cluster that runs on this machine."""
    from ray._private.services import canonicalize_bootstrap_address

    address: str | None = canonicalize_bootstrap_address("auto")
    if address is None:
        raise ConnectionError("no Ray cluster runs on this machine")
    return address


def _is_host_and_port(address: str) -> bool:
    """Whether an address is `host:port`, not "auto", "local" or `ray://...`."""
    host, _, port = address.rpartition(":")
    return bool(host) and "/" not in host and port.isdigit()


def _refuse_dead_address(address: str) -> None:
    """Raise `FindRecError` at once if nothing answers at `host:port`; Ray would retry for many minutes."""
    host, _, port = address.rpartition(":")
    try:
        socket.create_connection((host, int(port)), timeout=10).close()
    except OSError as error:
        raise FindRecError(
            f"no Ray cluster answers at {address!r} ({error}). Start one with `ray start --head`, or "
            "unset cluster.address and RAY_ADDRESS to run on this machine alone."
        ) from None
