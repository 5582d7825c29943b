"""What each Ray worker runs: open the data, build model, table and engine, train; the same for any number."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import torch

from findrec.cluster.engine import DeepSpeedTower
from findrec.cluster.launch import worker_threads
from findrec.cluster.pulse import BeatingPulse
from findrec.cluster.supervise import RESULT_ERROR, RESULT_STOPPED
from findrec.config import RunConfig, parse_config
from findrec.datasets.folder import DataFolder
from findrec.errors import DivergedError
from findrec.ops.selective_scan import scan_backend
from findrec.progress import say
from findrec.training.allocator import keep_freed_memory
from findrec.training.build import build_table, build_tower_model, table_placement, used_modalities
from findrec.training.checkpoint import TrainState
from findrec.training.loop import run_training
from findrec.training.metrics_log import MetricsLog
from findrec.training.runs import checkpoint_folder, training_jobs
from findrec.training.tracking import Tracker
from findrec.training.worker import StopRequested, Worker


def train_worker(payload: dict[str, Any]) -> dict[str, Any]:
    """Entry point given to Ray Train; `payload` holds plain values and the board of the driver.

    Returns nothing when all went well, else `RESULT_STOPPED` with where it stopped as it was asked to, or
    `RESULT_ERROR` with the message of an error that a restart would not mend.
    """
    import ray
    import ray.train
    import ray.train.torch
    from ray.train.v2._internal.execution import context as reporting

    # Ray prints every report of every worker; its logger is named after the file and so heeds no Ray setting.
    logging.getLogger(reporting.__file__).setLevel(logging.WARNING)
    context = ray.train.get_context()
    device = ray.train.torch.get_device()
    rank = context.get_world_rank()
    pulse = BeatingPulse(payload["board"], rank, ray.get_runtime_context().get_node_id())
    worker = Worker(rank, context.get_world_size(), device, pulse)
    config = parse_config(payload["config"])
    keep_freed_memory()
    torch.set_num_threads(worker_threads(config))
    folder = DataFolder.open(  # the driver verified it
        payload["data_folder"], verify=False, cache_bytes=config.data.cache_bytes
    )
    try:
        for job in training_jobs(config, Path(payload["run_folder"])):
            _train_one(job.config, job.folder, folder, worker, ray.train.report)
    except StopRequested as stop:
        return {RESULT_STOPPED: str(stop)}
    except DivergedError as error:
        return {RESULT_ERROR: str(error)}  # said once, by all workers together
    return {}


def _train_one(config: RunConfig, run_folder: Path, folder: DataFolder, worker: Worker, report: Any) -> None:
    torch.manual_seed(config.training.seed)
    if worker.device.type == "cuda":  # rounds operands of float32 products to 10 bits (or not at all)
        torch.set_float32_matmul_precision("high" if config.training.precision == "bfloat16" else "highest")
    modalities = used_modalities(config, folder)
    model = build_tower_model(config, folder)
    if worker.leads:
        num_weights = sum(p.numel() for p in model.parameters())
        place = table_placement(config, folder, worker.world)
        say(
            f"{config.model.name}: {num_weights:,} weights in the tower, item table {folder.num_items:,} x "
            f"{config.model.dim} {place.mode} ({place.why}), modalities {', '.join(modalities) or 'none'}, "
            f"scan {scan_backend(worker.device, config.model.stream.scan)} on {worker.device}, "
            f"{config.training.precision}"
        )
    table = build_table(config, folder, worker.device)
    tower = DeepSpeedTower(
        model,
        config.training.optim,
        stage=config.cluster.zero_stage,
        accumulation=config.training.microbatches // worker.world,
        device=worker.device,
        offload_optimizer=config.cluster.offload_optimizer,
    )
    log: MetricsLog | None = None
    tracker: Tracker | None = None
    if worker.leads:
        log = MetricsLog(run_folder)
        tracker = Tracker.start(config, run_folder, watch=True)

    def started(state: TrainState) -> None:
        if log is not None:
            log.truncate_after(state.step)
        if state.started_from:
            say(f"{config.model.name}: weights and rows of known items taken from {state.started_from}")
            if tracker is not None:
                tracker.tag("started_from", state.started_from)

    run_training(
        config,
        folder,
        checkpoint_folder(run_folder),
        tower,
        table,
        worker=worker,
        log=None if log is None else _Both(log, tracker),
        on_start=started,
        after_epoch=report,
    )
    if tracker is not None:
        tracker.finish("FINISHED")  # the driver opens the run again to add the final table


class _Both:
    """`metrics.jsonl`, mirrored to MLflow."""

    def __init__(self, log: MetricsLog, tracker: Tracker | None) -> None:
        self._log = log
        self._tracker = tracker

    def log(self, step: int, epoch: int, values: Any) -> None:
        self._log.write(step, epoch, values)
        if self._tracker is not None:
            self._tracker.log(step, values)
