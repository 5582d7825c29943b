"""The trained models of a run folder, at their best checkpoints."""

from __future__ import annotations

from pathlib import Path

import torch

from findrec.config import RunConfig
from findrec.datasets.folder import DataFolder
from findrec.datasets.prepare import open_data_folder
from findrec.errors import FindRecError
from findrec.evaluation.scorers import ModelScorer
from findrec.models.findrec import FindRec
from findrec.models.streaming import StreamingFindRec
from findrec.training.build import build_catalogue, build_tower_model
from findrec.training.checkpoint import Checkpoint, load_checkpoint
from findrec.training.checkpoint_store import CheckpointStore
from findrec.training.runs import TrainingJob, checkpoint_folder, read_run_config, training_jobs
from findrec.training.validations import best_checkpoint


def load_scorer(
    job: TrainingJob,
    folder: DataFolder,
    device: torch.device | str = "cpu",
    checkpoint: Path | None = None,
) -> ModelScorer:
    """The model of a training at its best checkpoint, or at the one given; raises `FindRecError` when there
    is none or it is damaged.
    """
    saved = _best(job) if checkpoint is None else load_checkpoint(checkpoint)
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


def _best(job: TrainingJob) -> Checkpoint:
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
    return saved


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


def set_up(config: RunConfig) -> str:
    """Take the threads a worker trained with and return the device to evaluate on.

    One thread a worker in training and here: the sums behind every vector are then the same.
    """
    torch.set_num_threads(max(1, config.cluster.threads or torch.get_num_threads()))
    return "cuda" if config.cluster.gpu is not False and torch.cuda.is_available() else "cpu"
