"""Builds the model, the tables and the catalogue of a run from its configuration and data folder."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from findrec.config import RunConfig
from findrec.datasets.batches.catalogue import Catalogue
from findrec.datasets.batches.training_pairs import TrainingPairs
from findrec.datasets.folder.data_folder import DataFolder
from findrec.errors import FindRecError, suggest
from findrec.models.base import DataFacts, Model, TableShape
from findrec.models.parts.activation_checkpointing import enable_activation_checkpointing
from findrec.models.registry import build_model, model_class
from findrec.tables.base import ITEMS, Table
from findrec.tables.item_table import ItemTable
from findrec.tables.placement import Placement, place_table
from findrec.tables.sharded_table import ShardedItemTable
from findrec.tables.table_spec import TableSpec


def used_modalities(config: RunConfig, folder: DataFolder) -> list[str]:
    """The modalities that are inputs of the model; raises `FindRecError` if the data lacks one."""
    wanted = config.model.content
    if wanted == "all":
        return list(folder.modalities)
    check_modalities(wanted, folder, config.model.title)
    return list(wanted)


def check_modalities(wanted: Sequence[str], folder: DataFolder, reader: str) -> None:
    """Raise `FindRecError` if the data lacks features of a modality that a model or baseline reads."""
    for name in wanted:
        if name not in folder.modalities:
            have = ", ".join(folder.modalities) or "none"
            raise FindRecError(
                f"{reader} reads features of {name!r}, but {folder.path} has {have}"
                f"{suggest(name, folder.modalities)}. Add them with `findrec features`, or change the "
                "modalities in the configuration"
            )


def build_catalogue(config: RunConfig, folder: DataFolder) -> Catalogue:
    """The features of the modalities that are inputs of the model."""
    names = used_modalities(config, folder)
    return Catalogue(folder, names, noise=config.data.feature_noise, seed=config.training.seed)


def data_facts(
    config: RunConfig, folder: DataFolder, artifacts: Mapping[str, Path] | None = None
) -> DataFacts:
    """The properties of the data for the model; raises `FindRecError` if the data lacks an input."""
    types = folder.manifest.event_types
    if config.model.event_types and not types:
        raise FindRecError(
            f"model.events is true, but {folder.path} has no event types; set model.events=false, or name a "
            "column `event` in the recipe"
        )
    return DataFacts(
        num_items=folder.num_items,
        num_users=folder.num_users,
        feature_dims={name: folder.feature(name).dim for name in used_modalities(config, folder)},
        num_event_types=len(types) if config.model.event_types else 0,
        max_length=config.data.max_length,
        artifacts=artifacts or {},
        training_pairs=partial(TrainingPairs.read, folder),
    )


def build_tower_model(
    config: RunConfig, folder: DataFolder, artifacts: Mapping[str, Path] | None = None
) -> Model[Any]:
    """The model, initialised from torch's global generator (seed it first)."""
    model = build_model(config.model, data_facts(config, folder, artifacts))
    if config.training.checkpoint_activations:
        enable_activation_checkpointing(model)
    model.low_precision = config.training.precision == "bfloat16"
    return model


def place_tables(config: RunConfig, folder: DataFolder, workers: int) -> dict[str, Placement]:
    """The placement of each table of the model on `workers` workers, by table name."""
    scored = scores_content(config, folder)
    return {
        name: place_table(config, shape.num_rows, shape.dim, workers, content=scored and name == ITEMS)
        for name, shape in table_shapes(config, folder).items()
    }


def table_shapes(config: RunConfig, folder: DataFolder) -> dict[str, TableShape]:
    """The sizes of the tables of the model, by name."""
    return model_class(config.model).tables(config.model, data_facts(config, folder))


def build_tables(
    config: RunConfig, folder: DataFolder, device: torch.device | str = "cpu"
) -> dict[str, Table]:
    """The tables of the model by name, initialised from the seed of the run and placed on all workers."""
    workers = dist.get_world_size() if dist.is_initialized() else 1
    placements = place_tables(config, folder, workers)
    tables: dict[str, Table] = {}
    for name, shape in table_shapes(config, folder).items():
        spec = TableSpec(
            shape.num_rows,
            shape.dim,
            seed=config.training.seed,
            loss=config.training.loss,
            optim=config.training.optim,
            name=name,
            device=device,
        )
        if name == ITEMS:
            spec = _of_items(spec, config, folder)
        tables[name] = ShardedItemTable(spec) if placements[name].mode == "sharded" else ItemTable(spec)
    return tables


def _of_items(spec: TableSpec, config: RunConfig, folder: DataFolder) -> TableSpec:
    """Add the item counts and the classes that the catalogue loss needs."""
    classes = config.training.loss.classes
    if classes == "auto":
        classes = "trained" if scores_content(config, folder) else "all"
    return replace(spec, train_count=torch.from_numpy(folder.train_count), only_trained=classes == "trained")


def scores_content(config: RunConfig, folder: DataFolder) -> bool:
    """Whether the model also scores items by content, so that items without events can be ranked."""
    return config.model.scores_content and bool(used_modalities(config, folder))
