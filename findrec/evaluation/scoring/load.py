"""Loads the trained models of a run folder, at their best checkpoints, with the scorers that rank them."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from findrec.config import RunConfig
from findrec.datasets.batches.catalogue import Catalogue
from findrec.datasets.folder.data_folder import DataFolder
from findrec.errors import FindRecError
from findrec.evaluation.scoring.base import Scorer
from findrec.evaluation.scoring.inner_product import InnerProductScorer, ModelScorer
from findrec.models.base import Model, SequenceModel
from findrec.models.config import ModelConfig
from findrec.models.configs import import_object
from findrec.models.registry import model_class
from findrec.tables.base import ITEMS
from findrec.training.build import build_catalogue, build_tower_model
from findrec.training.checkpoints.checkpoint import (
    Checkpoint,
    checkpoint_folder,
    list_checkpoints,
    load_checkpoint,
    read_state,
)
from findrec.training.checkpoints.store import CheckpointStore
from findrec.training.checkpoints.validations import SELECTS, best_checkpoint, find_artifacts
from findrec.training.identity import check_identity, check_num_items
from findrec.training.runs import TrainingJob, training_jobs
from findrec.training.tower import check_weights

VALIDATION_K = 10  # cut-off of the metrics of a validation


def scorer_class(config: ModelConfig) -> type[Scorer]:
    """The class at `config.scorer`; raises `FindRecError` if it cannot rank the model in validation."""
    cls, key = import_object(config.scorer, "scorer"), f"scorer={config.scorer!r}"
    if not (isinstance(cls, type) and issubclass(cls, Scorer)):
        raise FindRecError(f"{key} is not a subclass of findrec.evaluation.scoring.base.Scorer")
    if issubclass(cls, ModelScorer) and not issubclass(model_class(config), SequenceModel):
        raise FindRecError(
            f"{key} needs a SequenceModel, but {config.implementation} is not one: set the class variable "
            "`scorer` of its configuration, or `ranked = False` if it does not rank items"
        )
    _check_list_limit(key, cls.list_limit)
    return cls


def _check_list_limit(key: str, limit: int | None) -> None:
    if limit is not None and limit < VALIDATION_K:
        raise FindRecError(
            f"{key} gives lists of {limit} items, but validation needs {VALIDATION_K} to compute {SELECTS}: "
            f"set its list_limit to {VALIDATION_K} or more"
        )


def make_scorer(
    config: RunConfig,
    model: Model[Any],
    weights: Mapping[str, Tensor],
    catalogue: Catalogue,
    device: torch.device | str,
    name: str,
) -> Scorer:
    """The scorer that `config.model.scorer` names, with the arguments of `ModelScorer`.

    `weights` are the rows of all tables by name; the scorer gets those of the items, unless it
    `reads_all_tables`.
    """
    cls: Any = scorer_class(config.model)
    rows = weights if cls.reads_all_tables else weights[ITEMS]
    scorer: Scorer = cls(model, rows, catalogue, config.data.max_length, device, name=name)
    _check_list_limit(f"scorer={config.model.scorer!r}", scorer.list_limit)
    return scorer


def check_run_data(config: RunConfig, run_folder: Path, folder: DataFolder) -> None:
    """Raise `FindRecError` if `folder` is not the data a run was trained on; reads no weights."""
    for job in (job for job in training_jobs(config, run_folder) if job.ranked):
        for path in reversed(list_checkpoints(checkpoint_folder(job.folder))):
            try:
                saved = read_state(path).catalogue
            except FindRecError:
                continue  # damaged
            check_identity(folder, saved, path)
            break


def load_ranker(
    job: TrainingJob, folder: DataFolder, device: torch.device | str = "cpu", checkpoint: Path | None = None
) -> Scorer:
    """The scorer of a training at its best checkpoint, or at `checkpoint`.

    Raises `FindRecError` if there is no checkpoint, it is damaged, or `folder` is not its data.
    """
    saved = _best(job) if checkpoint is None else load_checkpoint(checkpoint)
    all_tables = scorer_class(job.config.model).reads_all_tables
    if ITEMS in saved.tables:
        check_num_items(folder, saved.table.num_rows - 1, saved.path)
    elif not all_tables:
        raise FindRecError(f"{saved.path} has no table of items, so its model cannot be ranked")
    check_identity(folder, saved.state.catalogue, saved.path)
    model = build_tower_model(job.config, folder, find_artifacts(job.config, job.needs))
    check_weights(model, saved.tower, saved.path)
    model.load_state_dict(saved.tower)
    model.to(device).eval()
    catalogue = build_catalogue(job.config, folder)
    names = saved.tables if all_tables else [ITEMS]
    weights = {name: saved.tables[name]["weight"] for name in names}
    return make_scorer(job.config, model, weights, catalogue, device, job.name)


def load_scorer(job: TrainingJob, folder: DataFolder, device: torch.device | str = "cpu") -> ModelScorer:
    """`load_ranker` for uses that need a sequence model; raises `FindRecError` if it is none."""
    scorer = load_ranker(job, folder, device)
    if not isinstance(scorer, ModelScorer):
        raise _no_vectors(job, "ModelScorer")
    return scorer


def load_inner_product(
    job: TrainingJob, folder: DataFolder, device: torch.device | str = "cpu"
) -> InnerProductScorer:
    """`load_ranker` for uses that need vectors of users and items; raises `FindRecError` if it has none."""
    scorer = load_ranker(job, folder, device)
    if not isinstance(scorer, InnerProductScorer):
        raise _no_vectors(job, "InnerProductScorer")
    return scorer


def _no_vectors(job: TrainingJob, needed: str) -> FindRecError:
    return FindRecError(
        f"{job.name} is ranked by {job.config.model.scorer}, but this needs a model with user vectors "
        f"(a subclass of findrec.evaluation.scoring.inner_product:{needed})"
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


def set_up(config: RunConfig) -> str:
    """Take the threads a worker trained with and return the device to evaluate on.

    One thread a worker in training and here: the sums behind every vector are then the same.
    """
    torch.set_num_threads(max(1, config.cluster.threads or torch.get_num_threads()))
    return "cuda" if config.cluster.gpu is not False and torch.cuda.is_available() else "cpu"
