"""Starts a training from the weights of a finished run, on data that was grown from the data of that run.

The weights of the tower and the item rows of that run are loaded; rows of new items are initialised as
usual (content in item vectors makes them useful before they have events). Other tables are not loaded, as
users have other ids in grown data. The optimizer and its schedule start from scratch: moments belong to
gradients of other data, and new rows have none.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import safe_open
from torch import Tensor

from findrec.config import RunConfig
from findrec.datasets.folder.data_folder import DataFolder
from findrec.errors import FindRecError
from findrec.paths import find_run
from findrec.schema import changes
from findrec.tables.base import ITEMS, Table
from findrec.training.build import build_tower_model
from findrec.training.checkpoints.checkpoint import (
    checkpoint_folder,
    list_checkpoints,
    load_checkpoint,
    read_state,
)
from findrec.training.checkpoints.validations import best_checkpoint_path
from findrec.training.identity import catalogue_fingerprint
from findrec.training.runs import BASELINES, read_run_config, run_folder
from findrec.training.tower import OPTIMIZER_STATE, Tower, shape_difference


@dataclass(frozen=True)
class WarmStart:
    """A checkpoint that a training may start from."""

    path: Path
    num_items: int  # number of items in its table

    @property
    def title(self) -> str:
        """The path of the checkpoint and the digest of its manifest."""
        digest = hashlib.sha256((self.path / "manifest.json").read_bytes()).hexdigest()
        return f"{self.path} (manifest sha256 {digest})"


def find_warm_start(config: RunConfig, folder: DataFolder) -> WarmStart | None:
    """The best checkpoint of the run `training.warm_start`; None if that key is not set.

    Weights are not read. Raises `FindRecError` if the run cannot be used: no usable checkpoint, another
    model, or data that was not grown from the data of that run.
    """
    if config.training.warm_start is None:
        return None
    main, _, baseline = config.training.warm_start.partition(f"/{BASELINES}/")
    source = find_run(main, config.runs, here=False)
    if source == run_folder(config):
        raise FindRecError(
            f"training.warm_start={main} is this run itself. Give the new run another name (name=...), or "
            "leave out training.warm_start to resume it"
        )
    if baseline:
        source = source / BASELINES / baseline
        if not list_checkpoints(checkpoint_folder(source)):
            return None  # that run had no such baseline: this one starts cold
    path = best_checkpoint_path(checkpoint_folder(source))
    key = f"training.warm_start={config.training.warm_start}"
    if path is None:
        raise FindRecError(
            f"{key}: {source} has no usable checkpoint. Train that run first, or leave the key out"
        )
    _check_model(config, read_run_config(source), key, source)
    saved = read_state(path).catalogue
    if not saved:
        raise FindRecError(f"{key}: {path} does not record the items of its rows: train that run again")
    size = int(saved["items"][0])
    here = catalogue_fingerprint(config, folder, min(size, folder.num_items))
    if here["items"] != saved["items"]:
        raise FindRecError(
            f"{key}: the first {size:,} of the {folder.num_items:,} items of {folder.path} are not the items "
            f"of {source}, so its table rows would belong to other items. Prepare the data with `findrec "
            "prepare RECIPE --grow FOLDER`, where FOLDER is the data that run was trained on"
        )
    for part in ("event_types", "encoders"):
        if here[part] != saved[part]:
            raise FindRecError(
                f"{key}: {source} was trained with the {part.replace('_', ' ')} {saved[part]}, but "
                f"{folder.path} has {here[part]}, so its weights cannot be used"
            )
    with torch.random.fork_rng(devices=[]):  # this check must not change the random numbers of training
        tower = build_tower_model(config, folder).state_dict()
    _check_shapes(tower, path, key)
    return WarmStart(path, size)


def _check_model(config: RunConfig, old: RunConfig, key: str, source: Path) -> None:
    """Raise `FindRecError` if the run was trained with another model."""
    changed: list[tuple[str, object, object]]
    changed = [("model.name", old.model.name, config.model.name)]
    if old.model.name == config.model.name:
        changed = changes(old.model, config.model, "warm_start", "model.")
    classes = old.training.loss.classes, config.training.loss.classes
    if classes[0] != classes[1]:
        changed.append(("training.loss.classes", *classes))
    if changed:
        listed = "; ".join(f"{k}: {before!r} there, {now!r} here" for k, before, now in changed[:5])
        raise FindRecError(
            f"{key}: {source} has another model ({listed}). Use the same model here, or leave out "
            "training.warm_start"
        )


def _check_shapes(tower: dict[str, Tensor], path: Path, key: str) -> None:
    """Raise `FindRecError` if weights differ in shape, by data.max_length or by the widths of features."""
    with safe_open(str(path / "tower.safetensors"), framework="pt") as saved:
        have = {name: tuple(saved.get_slice(name).get_shape()) for name in saved.keys()}  # noqa: SIM118
    if difference := shape_difference({name: tuple(value.shape) for name, value in tower.items()}, have):
        raise FindRecError(
            f"{key}: {path} does not fit: {difference}. data.max_length and the data's features must be "
            "those of that run"
        )


def apply_warm_start(start: WarmStart, tower: Tower, tables: Mapping[str, Table]) -> None:
    """Load the weights and item rows of the checkpoint, with a new optimizer (a collective call)."""
    saved = load_checkpoint(start.path, verify=False)  # already verified by `find_warm_start`
    zeros = {
        f"{name}.{moment}": torch.zeros_like(w)
        for name, w in saved.tower.items()
        for moment in OPTIMIZER_STATE
    }
    tower.load(saved.tower, zeros, 0)
    if ITEMS in tables:
        tables[ITEMS].load_weights(saved.table)
