"""Ray: join a cluster or start one here, place the workers, restart what is lost.

Everything a worker needs travels as plain values: the resolved configuration and absolute paths. Ray
carries metrics only; checkpoints are files of the run folder.
"""

from __future__ import annotations

import logging
import os
import socket
import sys
import threading
from collections.abc import Iterator
from concurrent.futures import Future
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from findrec.config import RunConfig
from findrec.errors import DivergedError, FindRecError
from findrec.paths import home
from findrec.progress import say

if TYPE_CHECKING:
    from ray.train import Result
    from ray.train.torch import TorchTrainer

_RAY_SWITCHES = {
    "RAY_TRAIN_V2_ENABLED": "1",
    "RAY_TRAIN_ENABLE_PRINT_PATCH": "0",  # it prints every line of a worker twice
    "RAY_TRAIN_ENABLE_PREEMPTION_WATCHER": "0",
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
    """A Ray cluster for a run: the one at `cluster.address` or `RAY_ADDRESS`, else a local one."""
    os.environ.update(_RAY_SWITCHES)
    import ray

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
        _refuse_dead_address(address)
        ray.init(address=address, **common)
    else:
        cores = usable_cpus()
        say(f"starting Ray on this machine ({cores} CPU cores)")
        # The token stays with the run: one in ~/.ray would switch authentication on for later clusters.
        os.environ.setdefault("RAY_AUTH_MODE", "disabled")
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


def _refuse_dead_address(address: str) -> None:
    """Ray itself would try a dead `host:port` for many minutes before it says so."""
    host, _, port = address.rpartition(":")
    if not host or "/" in host or not port.isdigit():
        return  # "auto", "local", ray://...: Ray's own matter
    try:
        socket.create_connection((host, int(port)), timeout=10).close()
    except OSError as error:
        raise FindRecError(
            f"no Ray cluster answers at {address!r} ({error}). Start one with `ray start --head`, or "
            "unset cluster.address and RAY_ADDRESS to run on this machine alone."
        ) from None


def check_resources(config: RunConfig) -> None:
    """Refuse a placement the cluster can never fulfil: Ray would wait for it without end."""
    import ray

    have = ray.cluster_resources()
    need = config.cluster.workers * config.cluster.cpus_per_worker
    if have.get("CPU", 0) < need:
        raise FindRecError(
            f"{config.cluster.workers} workers with {config.cluster.cpus_per_worker:g} CPU each need "
            f"{need:g} CPUs, the cluster has {have.get('CPU', 0):g}. Lower cluster.workers or "
            "cluster.cpus_per_worker."
        )
    if config.cluster.gpu is True and have.get("GPU", 0) < config.cluster.workers:
        raise FindRecError(
            f"cluster.gpu=true asks for {config.cluster.workers} GPUs, the cluster has "
            f"{have.get('GPU', 0):g}. Lower cluster.workers or set cluster.gpu=auto."
        )


def uses_gpu(config: RunConfig) -> bool:
    """Whether workers get a GPU each: as configured; `auto` when the cluster has enough of them."""
    import ray

    if config.cluster.gpu == "auto":
        return bool(ray.cluster_resources().get("GPU", 0) >= config.cluster.workers)
    return config.cluster.gpu


def train_on_ray(config: RunConfig, data_folder: str, run_folder: Path) -> None:
    """Run `train_worker` on all workers to the end; lost workers are restarted `max_failures` times."""
    from ray.train import FailureConfig, LoggingConfig, ScalingConfig
    from ray.train import RunConfig as RayRunConfig
    from ray.train.torch import TorchConfig, TorchTrainer

    from findrec.cluster.worker import train_worker

    gpu = uses_gpu(config)
    resources: dict[str, float] = {"CPU": config.cluster.cpus_per_worker}
    if gpu:
        resources["GPU"] = 1
    backend = "nccl" if gpu else "gloo"
    share = "1 GPU" if gpu else f"{worker_threads(config)} CPU threads"
    say(
        f"placing {config.cluster.workers} workers ({share} each, {backend}), "
        f"ZeRO stage {config.cluster.zero_stage}, python {sys.executable}"
    )
    trainer = TorchTrainer(
        train_worker,
        train_loop_config={
            "config": config.model_dump(mode="json"),
            "data_folder": data_folder,
            "run_folder": str(run_folder),
        },
        scaling_config=ScalingConfig(
            num_workers=config.cluster.workers, use_gpu=gpu, resources_per_worker=resources
        ),
        torch_config=TorchConfig(backend=backend, timeout_s=int(config.cluster.timeout_s)),
        run_config=RayRunConfig(
            name="ray",
            storage_path=str(run_folder),
            failure_config=FailureConfig(max_failures=config.cluster.max_failures),
            logging_config=LoggingConfig(log_level="ERROR"),
        ),
    )
    try:
        result = _fit_aside(trainer)
    except Exception as error:
        raise _plain_error(error) from error
    if result.return_value is not None:  # rank 0's; divergence is noticed by all at the same step
        raise DivergedError(result.return_value)


def _fit_aside(trainer: TorchTrainer) -> Result:
    """`trainer.fit()` in a thread of its own; interrupting the wait leaves it to `ray.shutdown` to end it.

    Called from the main thread it would handle Ctrl-C itself: end with exit code 1 or, once training is over,
    swallow it.
    """
    outcome: Future[Result] = Future()

    def run() -> None:
        try:
            outcome.set_result(trainer.fit())
        except BaseException as error:
            outcome.set_exception(error)

    threading.Thread(target=run, name="ray-train", daemon=True).start()
    return outcome.result()


def _plain_error(error: BaseException) -> BaseException:
    """The `FindRecError` a worker stopped with, if that is what happened; else the error as it is."""
    failures = getattr(error, "worker_failures", None) or {}
    for failure in [*failures.values(), error.__cause__, error]:
        text = str(failure)
        marker = "FindRecError: "
        if marker in text:
            return FindRecError(text.rsplit(marker, 1)[1].strip())
    return error
