"""Starting a training from a finished run: its weights and table rows, on a catalogue that has grown since.

Taken over are the weights of the tower and the rows of the items the run knew; rows of new items start as in
any training (by the seed, whatever the number of workers; `model.items.features` gives them meaning before
they have events). The optimizer starts anew with its schedule: moments belong to the other data's gradients,
and new rows have none.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pyarrow as pa
import torch
from safetensors import safe_open
from torch import Tensor

from findrec.config import RunConfig
from findrec.datasets.folder import DataFolder
from findrec.errors import FindRecError
from findrec.paths import find_run
from findrec.tables.base import Table
from findrec.training.build import build_tower_model, used_modalities
from findrec.training.checkpoint import (
    CatalogueMark,
    list_checkpoints,
    load_checkpoint,
    read_state,
)
from findrec.training.runs import BASELINES, checkpoint_folder, flatten, read_run_config, run_folder
from findrec.training.tower import MOMENTS, Tower
from findrec.training.validations import best_checkpoint_path

# A model may differ in these keys: they are about how it is trained, not about what its weights mean.
_FREE_KEYS = (
    "model.dropout",
    "model.align.",
    "model.items.id_dropout",
    "model.routing.balance_weight",
    "model.routing.z_weight",
    "model.stream.scan",
)


@dataclass(frozen=True)
class WarmStart:
    """A checkpoint that a training may start from."""

    path: Path
    num_items: int  # items whose rows it holds

    @property
    def title(self) -> str:
        """Which weights these are: the place, and the digest of the checkpoint's manifest."""
        digest = hashlib.sha256((self.path / "manifest.json").read_bytes()).hexdigest()
        return f"{self.path} (manifest sha256 {digest})"


def mark_catalogue(config: RunConfig, folder: DataFolder, num_items: int | None = None) -> CatalogueMark:
    """What a run's weights say about a data folder: its first `num_items` items (default: all) by raw id, and
    the event types and encoders of what the model is given.
    """
    size = folder.num_items if num_items is None else num_items
    column = folder.item_column("raw")
    assert column is not None
    raw = pa.concat_arrays(column.slice(0, size).cast(pa.large_string()).chunks)
    _, offsets, text = raw.buffers()
    ends = np.frombuffer(offsets, dtype="<i8")[raw.offset : raw.offset + size + 1]
    digest = hashlib.sha256(np.diff(ends).tobytes())  # of the lengths too: names run into each other
    digest.update(memoryview(text or b"")[ends[0] : ends[-1]])
    used = used_modalities(config, folder)
    encoders = {
        entry.modality: entry.weights_sha256 or entry.encoder
        for entry in folder.manifest.features
        if entry.modality in used
    }
    types = folder.manifest.event_types if config.model.events else []
    return {"items": [str(size), digest.hexdigest()], "event_types": list(types), "encoders": encoders}


def find_warm_start(config: RunConfig, folder: DataFolder) -> WarmStart | None:
    """The best checkpoint of the run that `training.warm_start` names, or None without that key.

    Only what is small is read. `FindRecError` where that run cannot be continued on this data: no usable
    checkpoint, another model, or a catalogue that is not a growth of the run's.
    """
    if config.training.warm_start is None:
        return None
    main, _, baseline = config.training.warm_start.partition(f"/{BASELINES}/")
    source = find_run(main, config.runs, here=False)
    if source == run_folder(config):
        raise FindRecError(
            f"training.warm_start={main} is this run itself. Give the new run another name (name=...); "
            "without training.warm_start the same command continues it"
        )
    if baseline:
        source = source / BASELINES / baseline
        if not list_checkpoints(checkpoint_folder(source)):
            return None  # that run was compared with others: this baseline starts cold
    path = best_checkpoint_path(checkpoint_folder(source))
    key = f"training.warm_start={config.training.warm_start}"
    if path is None:
        raise FindRecError(
            f"{key}: {source} has no usable checkpoint. Train that run first, or leave the key out"
        )
    _check_model(config, read_run_config(source), key, source)
    mark = read_state(path).catalogue
    if not mark:
        raise FindRecError(f"{key}: {path} does not say which items its rows belong to: train that run again")
    size = int(mark["items"][0])
    if size > folder.num_items or (here := mark_catalogue(config, folder, size))["items"] != mark["items"]:
        raise FindRecError(
            f"{key}: the first {size:,} of the {folder.num_items:,} items of {folder.path} are not the items "
            f"of {source}, so its table rows would go to other items. Prepare the data with `findrec prepare "
            "RECIPE --grow FOLDER`, where FOLDER is the data that run was trained on"
        )
    for part in ("event_types", "encoders"):
        if here[part] != mark[part]:
            raise FindRecError(
                f"{key}: {source} was trained with the {part.replace('_', ' ')} {mark[part]}, {folder.path} "
                f"has {here[part]}: its weights would mean something else here"
            )
    with torch.random.fork_rng(devices=[]):  # training draws the same numbers with and without this check
        tower = build_tower_model(config, folder).state_dict()
    _check_shapes(tower, path, key)
    return WarmStart(path, size)


def _check_model(config: RunConfig, old: RunConfig, key: str, source: Path) -> None:
    here, there = (
        flatten({"model": c.model.model_dump(), "training": {"loss": {"classes": c.training.loss.classes}}})
        for c in (config, old)
    )
    changed = [k for k in here if there.get(k) != here[k] and not k.startswith(_FREE_KEYS)]
    if changed:
        listed = "; ".join(f"{k}: {there.get(k)!r} there, {here[k]!r} here" for k in changed[:5])
        raise FindRecError(
            f"{key}: {source} holds another model ({listed}). Give this run the same, or leave "
            "training.warm_start out"
        )


def _check_shapes(tower: dict[str, Tensor], path: Path, key: str) -> None:
    """What the configurations leave open: data.max_length, widths of features."""
    with safe_open(str(path / "tower.safetensors"), framework="pt") as saved:
        there = {name: tuple(saved.get_slice(name).get_shape()) for name in saved.keys()}  # noqa: SIM118
    here = {name: tuple(value.shape) for name, value in tower.items()}
    for name in sorted(here.keys() | there.keys()):
        if here.get(name) != there.get(name):
            raise FindRecError(
                f"{key}: the weights {name!r} of {path} have the shape {there.get(name)}, this run "
                f"needs {here.get(name)}. data.max_length and the data's features must be those of that run"
            )


def apply_warm_start(start: WarmStart, tower: Tower, table: Table) -> None:
    """Put the checkpoint's weights and rows in place, with a fresh optimizer (collective)."""
    saved = load_checkpoint(start.path, verify=False)  # `find_warm_start` just did
    zeros = {f"{name}.{moment}": torch.zeros_like(w) for name, w in saved.tower.items() for moment in MOMENTS}
    tower.load(saved.tower, zeros, 0)
    table.start_from(saved.table)
