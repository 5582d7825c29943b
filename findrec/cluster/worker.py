"""The entry point of a Ray worker: opens the data, builds model, tables and engine, and trains."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import torch

from findrec.cluster.heartbeat import ReportingHeartbeat
from findrec.cluster.heartbeat_registry import RESULT_ERROR, RESULT_STOPPED
from findrec.cluster.zero.engine import DeepSpeedTower
from findrec.config import RunConfig, parse_config
from findrec.datasets.folder.data_folder import DataFolder
from findrec.errors import DivergedError, FindRecError, system_error
from findrec.evaluation.validation import validate
from findrec.models.base import Model
from findrec.ops.precision import allow_tf32
from findrec.progress import say
from findrec.ray_session import worker_threads
from findrec.tables.base import ITEMS
from findrec.training.allocator import keep_freed_memory
from findrec.training.build import build_tables, build_tower_model, place_tables, used_modalities
from findrec.training.checkpoints.checkpoint import TrainState, checkpoint_folder
from findrec.training.checkpoints.validations import find_artifacts
from findrec.training.logs.metrics_log import MetricsLog
from findrec.training.logs.tracking import Tracker
from findrec.training.loop import run_training
from findrec.training.runs import TrainingJob, training_jobs
from findrec.training.tower import PlainTower, Tower
from findrec.training.worker import StopRequested, Worker, share_text


def train_worker(payload: dict[str, Any]) -> dict[str, Any]:
    """Entry point given to Ray Train; `payload` holds plain values and the registry of the driver.

    Returns an empty dictionary on success, `RESULT_STOPPED` with a message after a stop request, or
    `RESULT_ERROR` with the message of an error that a restart would not fix.
    """
    import ray
    import ray.train
    import ray.train.torch
    from ray.train.v2._internal import util as training_errors
    from ray.train.v2._internal.execution import context as reporting

    # Ray prints every report of every worker; its logger is named after the file, so Ray settings do not
    # apply.
    logging.getLogger(reporting.__file__).setLevel(logging.WARNING)
    logging.getLogger(training_errors.__name__).addFilter(_is_unexpected)
    context = ray.train.get_context()
    device = ray.train.torch.get_device()
    rank = context.get_world_rank()
    heartbeat = ReportingHeartbeat(
        payload["heartbeats"],
        rank,
        ray.get_runtime_context().get_node_id(),
        asynchronous=device.type == "cuda",
    )
    worker = Worker(rank, context.get_world_size(), device, heartbeat)
    config = parse_config(payload["config"])
    keep_freed_memory()
    torch.set_num_threads(worker_threads(config))
    folder = DataFolder.open(  # the driver verified it
        payload["data_folder"], verify=False, cache_bytes=config.data.cache_bytes
    )
    try:
        for job in training_jobs(config, Path(payload["run_folder"])):
            _train_one(job, folder, worker, ray.train.report)
    except StopRequested as stop:
        return {RESULT_STOPPED: str(stop)}
    except DivergedError as error:
        return {RESULT_ERROR: str(error)}  # the same on all workers
    except OSError as error:
        if (message := system_error(error)) is not None:
            raise message from error
        raise
    return {}


def _is_unexpected(record: logging.LogRecord) -> bool:
    """Whether a traceback that Ray logs is not that of an error which the driver reports in one message."""
    return f"{FindRecError.__name__}: " not in record.getMessage()


def _train_one(job: TrainingJob, folder: DataFolder, worker: Worker, report: Any) -> None:
    config, run_folder = job.config, job.folder
    torch.manual_seed(config.training.seed)
    if worker.device.type == "cuda":
        allow_tf32(config.training.precision == "bfloat16")
    artifacts = _artifacts(job, worker)
    model = build_tower_model(config, folder, artifacts)
    if worker.is_rank_zero:
        num_weights = sum(p.numel() for p in model.parameters())
        modalities = ", ".join(used_modalities(config, folder)) or "none"
        details = [
            f"{num_weights:,} weights in the tower",
            *_describe_tables(config, folder, worker.world),
            f"modalities {modalities}",
            model.describe(worker.device),
            f"on {worker.device}, {config.training.precision}",
        ]
        say(f"{job.name}: {', '.join(filter(None, details))}")
    tables = build_tables(config, folder, worker.device)
    tower = _tower(model, config, worker)
    log: MetricsLog | None = None
    tracker: Tracker | None = None
    if worker.is_rank_zero:
        log = MetricsLog(run_folder)
        tracker = Tracker.start(config, run_folder, watch=True)
        tracker.tag("checkpoint", str(checkpoint_folder(run_folder.resolve())))

    def started(state: TrainState) -> None:
        if log is not None:
            log.truncate_after(state.step)
        if state.started_from:
            say(f"{job.name}: weights and item rows loaded from {state.started_from}")
            if tracker is not None:
                tracker.tag("started_from", state.started_from)

    run_training(
        config,
        folder,
        checkpoint_folder(run_folder),
        tower,
        tables,
        worker=worker,
        validate=validate,
        log=None if log is None else _MirroredLog(log, tracker),
        on_start=started,
        after_epoch=report,
        earlier=None if job.continues is None else artifacts[job.continues],
    )
    if tracker is not None:
        tracker.finish("FINISHED")  # the driver opens the run again to add the final table


def _artifacts(job: TrainingJob, worker: Worker) -> dict[str, Path]:
    if not job.needs:
        return {}
    # Wait for rank 0, which has then written the checkpoints of the earlier stages.
    share_text("", worker.device)
    return find_artifacts(job.config, job.needs)


def _tower(model: Model[Any], config: RunConfig, worker: Worker) -> Tower:
    if not any(True for _ in model.parameters()):
        return PlainTower(model.to(worker.device), config.training.optim)  # only tables are trained
    return DeepSpeedTower(
        model,
        config.training.optim,
        stage=config.cluster.zero_stage,
        accumulation=config.training.microbatches // worker.world,
        device=worker.device,
        offload_optimizer=config.cluster.offload_optimizer,
    )


def _describe_tables(config: RunConfig, folder: DataFolder, workers: int) -> list[str]:
    lines = []
    for name, table in place_tables(config, folder, workers).items():
        title = "item table" if name == ITEMS else f"table {name}"
        lines.append(f"{title} {table.num_rows:,} x {table.dim} {table.mode} ({table.why})")
    return lines


class _MirroredLog:
    """`metrics.jsonl`, mirrored to MLflow."""

    def __init__(self, log: MetricsLog, tracker: Tracker | None) -> None:
        self._log = log
        self._tracker = tracker

    def log(self, step: int, epoch: int, values: Any) -> None:
        self._log.write(step, epoch, values)
        if self._tracker is not None:
            self._tracker.log(step, values)
