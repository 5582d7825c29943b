"""Benchmark of scaling: one run on two workers against two single-worker runs; memory, traffic and saving.

Workers are processes connected by gloo with one thread each, as in a run, but started without Ray. Throughput
is that of full steps of the training loop, including data and logging, after a warm-up step; the two setups
alternate. Memory is the peak resident set of a worker that has trained, validated and saved. Traffic is
measured on the loopback device, which nothing else may use.
"""

from __future__ import annotations

import multiprocessing
import os
import statistics
import tempfile
import time
import uuid
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from datetime import timedelta
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from bench.memory import peak_rss_bytes
from bench.scaling_model import Step, Table, sent_bytes

from findrec.config import RunConfig, parse_config
from findrec.datasets.batches.plan import plan_epoch
from findrec.datasets.batches.windows import build_windows
from findrec.datasets.folder.data_folder import DataFolder
from findrec.datasets.folder.in_memory import write_data_folder
from findrec.tables.base import ITEMS
from findrec.training.build import place_tables

Figures = dict[str, Any]
_LOOPBACK = Path("/sys/class/net/lo/statistics/tx_bytes")


def scaling_config(**training: object) -> RunConfig:
    """The configuration of a `findrec-2025` on synthetic data, with `training` overrides."""
    return parse_config(
        {
            "training": {"epochs": 1, "tokens": 1600, "eval_every": 1000} | training,
            "cluster": {"workers": 2},
            # As in `evaluation/scaling.md`. Its table rows are as wide as its item vectors, which
            # `scaling_model` assumes.
            "model": {"name": "findrec-2025", "align": {"diagnose_every": 0}},
        }
    )


def scaling_data(path: Path, *, items: int, users: int, events: int = 203) -> DataFolder:
    """Synthetic users with `events` events each, over items with a Zipf distribution."""
    rng = np.random.default_rng(0)
    drawn = (items ** rng.random((users, events))).astype(np.int64).clip(1)
    drawn[0, 0] = items
    text = rng.normal(size=(items, 32)).astype(np.float32)
    return write_data_folder(path, list(drawn), features={"text": text})


class _Marks:
    """A step log that records the end time of each step, and the loopback's byte count."""

    def __init__(self) -> None:
        self.marks: list[tuple[float, int]] = []

    def log(self, step: int, epoch: int, values: Any) -> None:
        if "train/loss" in values:
            self.marks.append((time.perf_counter(), _loopback_bytes()))


def _loopback_bytes() -> int:
    return int(_LOOPBACK.read_text()) if _LOOPBACK.is_file() else 0


def _worker(pipe: Connection, rank: int, world: int, rendezvous: str, data: str) -> None:
    """One worker process: trains each configuration received through the pipe until it receives None."""
    from findrec.cluster.zero.engine import DeepSpeedTower
    from findrec.evaluation.validation import validate
    from findrec.training.allocator import keep_freed_memory
    from findrec.training.build import build_tables, build_tower_model
    from findrec.training.loop import run_training
    from findrec.training.worker import Worker

    os.environ["LOCAL_RANK"] = str(rank)
    keep_freed_memory()
    torch.set_num_threads(1)
    dist.init_process_group(
        "gloo",
        init_method=f"file://{rendezvous}",
        rank=rank,
        world_size=world,
        timeout=timedelta(seconds=300),
    )
    folder = DataFolder.open(data, verify=False)
    while (job := pipe.recv()) is not None:
        config = parse_config(job["config"])
        torch.manual_seed(0)
        model = build_tower_model(config, folder)
        num_weights = sum(p.numel() for p in model.parameters())  # before stage 3 splits them
        tower = DeepSpeedTower(
            model,
            config.training.optim,
            stage=config.cluster.zero_stage,
            accumulation=config.training.microbatches // world,
            device=torch.device("cpu"),
            offload_optimizer=config.cluster.offload_optimizer,
        )
        marks, begin = _Marks(), time.perf_counter()
        run_training(
            config,
            folder,
            Path(job["checkpoints"]),
            tower,
            build_tables(config, folder),
            worker=Worker(rank, world),
            validate=validate,
            log=marks,
        )
        last = marks.marks[-1][0] if marks.marks else begin
        pipe.send(
            {
                "marks": marks.marks,
                "seconds_after": time.perf_counter() - last,
                "peak_bytes": peak_rss_bytes(),
                "weights": num_weights,
            }
        )
    dist.barrier()
    dist.destroy_process_group()


@contextmanager
def _workers(world: int, folder: DataFolder, scratch: Path) -> Iterator[Callable[[RunConfig], list[Figures]]]:
    """Start `world` processes that train together; yields a function that trains a configuration."""
    os.environ |= {"OMP_NUM_THREADS": "1", "FINDREC_QUIET": "1"}
    context = multiprocessing.get_context("spawn")
    pipes, processes = [], []
    rendezvous = scratch / f"{uuid.uuid4().hex}.rendezvous"
    scratch.mkdir(exist_ok=True)
    for rank in range(world):
        ours, theirs = context.Pipe()
        arguments = (theirs, rank, world, str(rendezvous), str(folder.path))
        process = context.Process(target=_worker, args=arguments, daemon=True)
        process.start()
        theirs.close()
        pipes.append(ours)
        processes.append(process)

    def train(config: RunConfig) -> list[Figures]:
        job = {"config": config.model_dump(mode="json"), "checkpoints": str(scratch / uuid.uuid4().hex)}
        for pipe in pipes:
            pipe.send(job)
        return [pipe.recv() for pipe in pipes]

    try:
        yield train
        for pipe in pipes:
            pipe.send(None)
    finally:
        for process in processes:
            process.join(timeout=60)


def bench_throughput(
    *, items: int = 10_000, steps: int = 3, rounds: int = 2, stages: Sequence[int] = (0, 1, 2, 3)
) -> list[Figures]:
    """Targets per second of one run on two workers, and of two concurrent runs on one worker each."""
    alone = _at_stage(scaling_config(), stage=0, workers=1)
    training = alone.training
    rows = training.num_tokens // alone.data.max_length
    joint: dict[int, list[float]] = {stage: [] for stage in stages}
    moved: dict[int, float] = {}
    apart: list[float] = []
    with tempfile.TemporaryDirectory() as name:
        scratch = Path(name)
        folder = scaling_data(scratch / "data", items=items, users=steps * training.microbatches * rows)
        targets = float(_planned_targets(alone, folder)[1:].sum())
        with (
            _workers(2, folder, scratch / "a") as both,
            _workers(1, folder, scratch / "b") as first,
            _workers(1, folder, scratch / "c") as second,
            ThreadPoolExecutor(2) as pool,
        ):
            for turn in range(rounds + 1):  # the first round warms up
                pair = list(pool.map(lambda train: train(alone)[0], (first, second)))
                for stage in stages if turn else stages[:1]:
                    measured = both(_at_stage(alone, stage=stage, workers=2))[0]
                    if turn:
                        joint[stage].append(targets / _seconds(measured))
                        moved[stage] = _traffic(measured)
                if turn:
                    apart.append(sum(targets / _seconds(one) for one in pair))
        steps_of = {
            stage: _step_of(_at_stage(alone, stage=stage, workers=2), folder, measured["weights"])
            for stage in stages
        }
    figures = []
    for stage in stages:
        ratios = [a / b for a, b in zip(joint[stage], apart, strict=True)]
        figures.append(
            {
                "bench": "throughput",
                "items": items,
                "microbatches": training.microbatches,
                "tokens": training.num_tokens,
                "zero_stage": stage,
                "joint_targets_per_s": round(statistics.median(joint[stage]), 1),
                "apart_targets_per_s": round(statistics.median(apart), 1),
                "ratios": [round(ratio, 3) for ratio in ratios],
                "ratio": round(statistics.median(ratios), 3),
                "loopback_mb_per_step": round(moved[stage] / 1e6, 2),
                "model_mb_per_step": round(2 * sum(sent_bytes(steps_of[stage]).values()) / 1e6, 2),
            }
        )
    return figures


def _at_stage(config: RunConfig, *, stage: int, workers: int) -> RunConfig:
    cluster = config.cluster.model_copy(update={"zero_stage": stage, "workers": workers})
    return config.model_copy(update={"cluster": cluster})


def _traffic(measured: Figures) -> float:
    """Bytes per step over the loopback, of all workers."""
    marks = measured["marks"]
    return float(marks[-1][1] - marks[0][1]) / (len(marks) - 1)


def bench_memory(
    *,
    items: int = 50_000,
    dim: int = 128,
    stages: Sequence[int] = (0, 1, 2, 3),
    tables: Sequence[Table] = ("replicated", "sharded"),
) -> list[Figures]:
    """Peak memory, traffic per step and time to save of two workers, by ZeRO stage and placement."""
    from findrec.cluster.plan.machines import this_machine
    from findrec.cluster.plan.plan import make_plan

    rows = []
    for table in tables:
        for stage in stages:
            tree = scaling_config(microbatches=4).model_dump(mode="json")
            tree["model"] |= {"dim": dim}
            tree["model"]["stream"] |= {"layers": 8}
            tree["cluster"] |= {"zero_stage": stage}
            tree["training"] |= {"table": table}
            config = parse_config(tree)
            with tempfile.TemporaryDirectory() as name:
                scratch = Path(name)
                folder = scaling_data(scratch / "data", items=items, users=3 * 4 * 8)
                with _workers(2, folder, scratch) as train:
                    measured = train(config)
                need = make_plan(config, folder, [this_machine()]).memory.total("device", "host")
                step = _step_of(config, folder, measured[0]["weights"])
            rows.append(
                {
                    "bench": "memory",
                    "table": table,
                    "zero_stage": stage,
                    "weights": measured[0]["weights"],
                    "items": items,
                    "dim": dim,
                    "peak_mib": [round(f["peak_bytes"] / 2**20) for f in measured],
                    "planned_mib": round(need / 2**20),
                    "loopback_mb_per_step": round(_traffic(measured[0]) / 1e6, 1),
                    "model_mb_per_step": round(2 * sum(sent_bytes(step).values()) / 1e6, 1),
                    "validate_and_save_s": round(measured[0]["seconds_after"], 2),
                }
            )
    return rows


def _planned_targets(config: RunConfig, folder: DataFolder) -> Any:
    training, windows = config.training, build_windows(config, folder)
    plan = plan_epoch(
        windows, seed=0, epoch=0, microbatches=training.microbatches, tokens=training.num_tokens
    )
    return plan.targets


def _seconds(measured: Figures) -> float:
    return float(measured["marks"][-1][0] - measured["marks"][0][0])


def _step_of(config: RunConfig, folder: DataFolder, weights: int) -> Step:
    users = range(min(folder.num_users, 64))
    distinct = [len(np.unique(folder.histories([user]).item)) for user in users]
    return Step(
        workers=config.cluster.workers,
        accumulation=config.training.microbatches // config.cluster.workers,
        weights=weights,
        items=folder.num_items,
        dim=config.model.dim,
        targets=config.training.num_tokens,
        distinct=min(config.training.num_tokens, folder.num_items),
        repeats=int(statistics.mean(distinct)) if config.model.repeat_consumption else 0,
        stage=config.cluster.zero_stage,
        table=place_tables(config, folder, config.cluster.workers)[ITEMS].mode,
    )
