"""From a run folder to its results: the best checkpoints and the baselines ranked, tables and report written.

`python -m findrec.train_dist` ends with this, and `findrec evaluate RUN` does the same again: one code path,
so the digits are the same.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from rich.console import Console

from findrec.config import RunConfig
from findrec.datasets.folder import DataFolder
from findrec.datasets.prepare import open_data_folder
from findrec.errors import FindRecError
from findrec.evaluation.baselines import make_baseline
from findrec.evaluation.evaluate import evaluate_scorers, write_results
from findrec.evaluation.metrics import seen_filter
from findrec.evaluation.report import draw_users, format_table, sample_recommendations, write_report
from findrec.evaluation.scorers import ModelScorer, Scorer
from findrec.models.findrec import FindRec
from findrec.models.streaming import StreamingFindRec
from findrec.progress import say
from findrec.training.build import build_catalogue, build_tower_model
from findrec.training.checkpoint import best_checkpoint
from findrec.training.checkpoint_store import CheckpointStore
from findrec.training.runs import (
    TRAINED_BASELINES,
    TrainingJob,
    checkpoint_folder,
    read_run_config,
    training_jobs,
)
from findrec.training.tracking import Tracker


def load_scorer(job: TrainingJob, folder: DataFolder, device: torch.device | str = "cpu") -> ModelScorer:
    """The model of a training at its best checkpoint; raises `FindRecError` when there is none."""
    checkpoints = checkpoint_folder(job.folder)
    store = CheckpointStore.of(job.config, checkpoints)
    if store is not None:
        store.fetch_best(checkpoints)
    saved = best_checkpoint(checkpoints)
    if saved is None:
        raise FindRecError(
            f"{job.folder} has no usable checkpoint: train it first (python -m findrec.train_dist --config "
            f"{job.folder / 'config.yaml'})"
        )
    model = build_tower_model(job.config, folder)
    model.load_state_dict(saved.tower)
    model.to(device).eval()
    return ModelScorer(
        model,
        saved.table["weight"],
        build_catalogue(job.config, folder),
        max_length=job.config.data.max_length,
        device=device,
        name=job.name,
    )


def load_streaming(run_folder: Path | str) -> StreamingFindRec:
    """The run's FindRec at its best checkpoint, ready to take events one at a time.

    Raises `FindRecError` for a run of another model or without a usable checkpoint.
    """
    config = read_run_config(Path(run_folder))
    folder = open_data_folder(config.data, verify=False)
    scorer = load_scorer(training_jobs(config, Path(run_folder))[0], folder)
    if not isinstance(scorer.model, FindRec):
        raise FindRecError(f"{run_folder} is a run of {config.model.name!r}; streaming needs findrec")
    return StreamingFindRec(scorer.model, scorer.rows_Vd, scorer.catalogue)


def _scorers(config: RunConfig, run_folder: Path, folder: DataFolder, device: str) -> Iterator[Scorer]:
    """Trained models first, then the other baselines, in the order of the configuration."""
    for job in training_jobs(config, run_folder):
        say(f"ranking {job.name}")
        yield load_scorer(job, folder, device)
    for name in config.evaluation.baselines:
        if name not in TRAINED_BASELINES:
            say(f"ranking {name}")
            yield make_baseline(name, folder)


def evaluate_run(run_folder: Path) -> dict[str, list[dict[str, Any]]]:
    """Rank the full catalogue with the run's best checkpoint and its baselines; write all results.

    Writes `metrics.json`, `ranks.parquet` and `report.html`, mirrors the test row to MLflow, prints the
    table and returns the metrics rows by split.
    """
    config = read_run_config(run_folder)
    folder = open_data_folder(config.data)
    # One thread a worker in training and here: the sums behind every vector are then the same.
    torch.set_num_threads(max(1, config.cluster.threads or torch.get_num_threads()))
    rows, ranks = evaluate_scorers(
        _scorers(config, run_folder, folder, _device(config)),
        folder,
        ks=config.evaluation.ks,
        users_per_block=config.evaluation.users_per_block,
        max_length=config.data.max_length,
        mask_seen=seen_filter(config.evaluation.mask_seen, folder),
        candidates=config.evaluation.candidates,
    )
    write_results(run_folder, rows, ranks, folder)
    rebuild_report(run_folder)
    _mirror(config, run_folder, rows)
    print_table(rows)
    return rows


def rebuild_report(run_folder: Path) -> Path:
    """Write `report.html` anew from what the run folder holds; returns its path."""
    config = read_run_config(run_folder)
    folder = open_data_folder(config.data)
    job = training_jobs(config, run_folder)[0]
    users = draw_users(folder, "test", config.evaluation.samples, seed=config.training.seed)
    samples = sample_recommendations(
        load_scorer(job, folder),
        folder,
        "test",
        users,
        max_length=config.data.max_length,
        mask_seen=seen_filter(config.evaluation.mask_seen, folder),
        candidates=config.evaluation.candidates,
    )
    return write_report(run_folder, folder=folder, samples=samples)


def print_table(rows: dict[str, list[dict[str, Any]]]) -> None:
    """The test table on standard output."""
    Console(width=None if Console().is_terminal else 120).print(format_table(rows["test"], title="test"))


def _device(config: RunConfig) -> str:
    return "cuda" if config.cluster.gpu is not False and torch.cuda.is_available() else "cpu"


def _mirror(config: RunConfig, run_folder: Path, rows: dict[str, list[dict[str, Any]]]) -> None:
    for job in training_jobs(config, run_folder):
        tracker = Tracker.start(job.config, job.folder)
        row = next(r for r in rows["test"] if r["model"] == job.name)
        saved = best_checkpoint(checkpoint_folder(job.folder))
        values = {f"test/{k}": v for k, v in row.items() if isinstance(v, float)}
        step = json.loads((saved.path / "state.json").read_text())["step"] if saved else 0
        tracker.log(step, values)
        if saved is not None:
            tracker.tag("checkpoint", str(saved.path))
        tracker.finish("FINISHED")
