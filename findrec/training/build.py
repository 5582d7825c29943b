"""From a configuration and a data folder to the parts that are trained or evaluated."""

from __future__ import annotations

import torch
import torch.distributed as dist

from findrec.config import RunConfig
from findrec.datasets.catalogue import Catalogue
from findrec.datasets.folder import DataFolder
from findrec.datasets.plan import Windows, cut_prefixes, cut_windows
from findrec.errors import FindRecError, suggest
from findrec.models.base import SequenceModel
from findrec.models.recompute import recompute_layers
from findrec.models.registry import build_model
from findrec.tables.base import Table
from findrec.tables.item_table import ItemTable
from findrec.tables.parts import TableSpec
from findrec.tables.placement import Placement, place_table
from findrec.tables.sharded_table import ShardedItemTable


def used_modalities(config: RunConfig, folder: DataFolder) -> list[str]:
    """The modalities the model is given: those asked for, checked against those the data has."""
    if config.model.name == "sasrec":
        return []
    if config.model.modalities == "all":
        return list(folder.modalities)
    for name in config.model.modalities:
        if name not in folder.modalities:
            have = ", ".join(folder.modalities) or "none"
            hint = suggest(name, folder.modalities)
            raise FindRecError(f"model.modalities names {name!r}, but {folder.path} has {have}{hint}")
    return list(config.model.modalities)


def build_windows(config: RunConfig, folder: DataFolder) -> Windows:
    """The pieces of training histories that `training.objective` asks for."""
    if config.training.objective == "all":
        return cut_windows(folder, config.data.max_length, config.data.overlap)
    return cut_prefixes(folder, config.data.max_length)


def build_catalogue(config: RunConfig, folder: DataFolder) -> Catalogue:
    """Features of the modalities the model is given."""
    names = used_modalities(config, folder)
    return Catalogue(folder, names, noise=config.data.feature_noise, seed=config.training.seed)


def build_tower_model(config: RunConfig, folder: DataFolder) -> SequenceModel:
    """The network, initialised from torch's global generator (seed it first)."""
    dims = {name: folder.feature(name).dim for name in used_modalities(config, folder)}
    types = folder.manifest.event_types
    if config.model.events and not types:
        raise FindRecError(
            f"model.events is true, but {folder.path} has no types of events; set model.events=false, or "
            "name a column `event` in the recipe"
        )
    model = build_model(
        config.model,
        feature_dims=dims,
        num_event_types=len(types) if config.model.events else 0,
        repeat=config.model.repeat,
        max_length=config.data.max_length,
    )
    if config.training.checkpoint_activations:
        recompute_layers(model)
    model.low_precision = config.training.precision == "bfloat16"
    return model


def table_placement(config: RunConfig, folder: DataFolder, workers: int) -> Placement:
    """Where the rows of the run's item table are when so many workers train."""
    return place_table(config, folder.num_items, workers, content=scores_content(config, folder))


def build_table(config: RunConfig, folder: DataFolder, device: torch.device | str = "cpu") -> Table:
    """The item table, initialised from the run's seed; its rows are placed on all workers there are."""
    classes = config.training.loss.classes
    if classes == "auto":
        classes = "trained" if scores_content(config, folder) else "all"
    spec = TableSpec(
        folder.num_items,
        config.model.dim,
        seed=config.training.seed,
        loss=config.training.loss,
        optim=config.training.optim,
        train_count=torch.from_numpy(folder.train_count),
        only_trained=classes == "trained",
        device=device,
    )
    workers = dist.get_world_size() if dist.is_initialized() else 1
    if table_placement(config, folder, workers).mode == "sharded":
        return ShardedItemTable(spec)
    return ItemTable(spec)


def scores_content(config: RunConfig, folder: DataFolder) -> bool:
    """Whether the configured model scores items by content too, so that unmet ones can be ranked."""
    return config.model.items.features in ("score", "both") and bool(used_modalities(config, folder))
