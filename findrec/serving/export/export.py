"""`findrec export`: a folder with all that a trained model needs to answer on another machine.

An export has the weights of the best checkpoint without optimizer state (safetensors), the configuration, the
items with their features, vectors of the items as Parquet and NumPy files, saved indexes on request, and a
model card. The histories of users are personal data, so they are exported on request only; without them an
export answers for given histories.

The folder gets its name only after its lists have been compared with those of the run.
"""

from __future__ import annotations

import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from findrec import __version__
from findrec.config import ClusterConfig, RunConfig, TrackingConfig, dump_config
from findrec.datasets.folder.data_folder import DataFolder
from findrec.errors import FindRecError
from findrec.evaluation.index.store import index_folder, load_index, read_metadata, save_index
from findrec.evaluation.protocol import seen_filter
from findrec.evaluation.scoring.allow_list import FILE
from findrec.evaluation.scoring.candidates import Candidates
from findrec.evaluation.scoring.inner_product import InnerProductScorer
from findrec.files import beside, replacing, sha256_file
from findrec.paths import resolve
from findrec.serving.export.card import model_card
from findrec.serving.export.checkpoints import copy_checkpoints
from findrec.serving.export.data import copy_data
from findrec.serving.lists import Lists, Recommended
from findrec.serving.recommender import Recommender
from findrec.serving.stored import CARD, DATA, EXPORT, ExportManifest, FileEntry
from findrec.training.build import used_modalities
from findrec.training.checkpoints.checkpoint import checkpoint_folder
from findrec.training.checkpoints.validations import best_checkpoint_path

_CHECKED = 32  # users whose lists are compared
_LISTS = "lists"  # allow-lists of the run's configuration


def export_run(
    run_folder: Path,
    target: Path | None = None,
    *,
    users: bool = False,
    indexes: Sequence[str] = (),
    force: bool = False,
) -> Path:
    """Export a run; returns the folder.

    Args:
        run_folder: the run.
        target: the folder to write; default: `export` in the run folder.
        users: also export the histories of the users, so that lists can be made for them by id.
        indexes: factory strings of saved indexes of the run (`findrec index`).
        force: replace an earlier export.

    Raises:
        FindRecError: for a run without a usable checkpoint, a target that exists, a missing index, a model
            that gives other lists without its users, or files that cannot be written.
    """
    target = run_folder / "export" if target is None else target
    _check_target(target, force)
    if (run_folder / EXPORT).is_file():
        raise FindRecError(f"{run_folder} is an export already: copy the folder")
    original = Recommender.load(run_folder)
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        part = beside(target, "part")
        try:
            _write(part, run_folder, original, users=users, indexes=indexes)
            _check_lists(part, original, users=users)
            if target.exists():
                shutil.rmtree(target)
            part.rename(target)
        finally:
            shutil.rmtree(part, ignore_errors=True)
    except OSError as error:
        raise FindRecError(
            f"cannot write the export {target}: {error.strerror or error}. Check free disk space and "
            "permissions"
        ) from None
    return target


def _check_target(target: Path, force: bool) -> None:
    if not target.exists() or (target.is_dir() and not any(target.iterdir())):
        return
    if not (target / EXPORT).is_file():
        raise FindRecError(f"{target} exists and is not an export: name another folder")
    if not force:
        raise FindRecError(
            f"{target} is an export already: pass --force to replace it, or name another folder"
        )


def _write(
    folder: Path, run_folder: Path, original: Recommender, *, users: bool, indexes: Sequence[str]
) -> None:
    config, data = original.config, original.folder
    folder.mkdir()
    checkpoint = copy_checkpoints(config, run_folder, folder, without_users=0 if users else data.num_users)
    copy_data(data, folder / DATA, used_modalities(config, data), users=users)
    exported = _exported_config(config, data, folder)
    (folder / "config.yaml").write_text(dump_config(exported), encoding="utf-8")
    for factory in dict.fromkeys(indexes):
        _copy_index(factory, run_folder, folder, original, checkpoint)
    if isinstance(original.scorer, InnerProductScorer):
        _write_vectors(folder / "vectors", original)
    card = model_card(run_folder, config, data, users=users, indexes=indexes)
    (folder / CARD).write_text(card, encoding="utf-8")
    names = {path: path.relative_to(folder).as_posix() for path in sorted(folder.rglob("*"))}
    manifest = ExportManifest(
        findrec=__version__,
        run=config.name,
        model=config.model.title,
        num_items=data.num_items,
        num_users=data.num_users if users else 0,
        latest=original.latest,
        files={
            name: FileEntry(bytes=path.stat().st_size, sha256=sha256_file(path))
            for path, name in names.items()
            if path.is_file() and name != CARD
        },
    )
    with replacing(folder / EXPORT, sync=True) as part:
        part.write_text(manifest.model_dump_json(indent=1) + "\n", encoding="utf-8")


def _exported_config(config: RunConfig, data: DataFolder, folder: Path) -> RunConfig:
    """The configuration without places of the machine it was trained on."""
    training = config.training.model_copy(update={"checkpoint_store": None, "warm_start": None})
    section = config.data.model_copy(update={"folder": None, "recipe": data.manifest.recipe})
    evaluation = config.evaluation.model_copy(
        update={
            "baselines": [],
            "evaluator": "inline",
            "pictures": None,
            "mask_seen": seen_filter(config.evaluation.mask_seen, data),
            "candidates": _copy_lists(config.evaluation.candidates, folder),
        }
    )
    return config.model_copy(
        update={
            "runs": "runs",
            "data": section,
            "training": training,
            "evaluation": evaluation,
            "cluster": ClusterConfig(workers=1),
            "tracking": TrackingConfig(enabled=False),
        }
    )


def _copy_lists(rule: str | list[str], folder: Path) -> str | list[str]:
    """Copy files of raw item ids in the rule into the export, and name them relative to it."""
    if isinstance(rule, str) and not rule.startswith(FILE):
        return rule
    found = []
    for number, one in enumerate([rule] if isinstance(rule, str) else rule):
        if one.startswith(FILE):
            path, column = resolve(one.removeprefix(FILE)), ""
            if not path.is_file() and "#" in one:
                before, _, column = one.removeprefix(FILE).rpartition("#")
                path, column = resolve(before), f"#{column}"
            (folder / _LISTS).mkdir(exist_ok=True)
            shutil.copyfile(path, folder / _LISTS / f"{number}{path.suffix}")
            one = f"{FILE}{_LISTS}/{number}{path.suffix}{column}"
        found.append(one)
    return found


def _copy_index(
    factory: str, run_folder: Path, folder: Path, original: Recommender, checkpoint: Path
) -> None:
    scorer = original.scorer
    best = best_checkpoint_path(checkpoint_folder(run_folder))
    assert best is not None, "the run was loaded from it"
    if not isinstance(scorer, InnerProductScorer):
        raise FindRecError(f"{scorer.name} has no item vectors, so it has no index: leave out --index")
    held_V = Candidates.of(original.folder, "all").since_V
    index = load_index(run_folder, factory, scorer.items_Vd, best, held_V)
    save_index(index, folder, checkpoint, read_metadata(index_folder(run_folder, factory)).build_s)


def _write_vectors(folder: Path, original: Recommender) -> None:
    """Vectors of all items for other stores, as Parquet with raw ids and as a NumPy matrix."""
    folder.mkdir()
    vectors_Vd = original.item_vectors()
    np.save(folder / "items.npy", vectors_Vd)
    column = pa.FixedSizeListArray.from_arrays(pa.array(vectors_Vd.reshape(-1)), vectors_Vd.shape[1])
    pq.write_table(pa.table({"item": original.item_ids, "vector": column}), folder / "items.parquet")


def _check_lists(folder: Path, original: Recommender, *, users: bool) -> None:
    """Raise `FindRecError` unless the export gives the lists of the run, digit for digit."""
    try:
        copy = Recommender.load(folder)
        data = original.folder
        rows = np.linspace(0, data.num_users - 1, min(_CHECKED, data.num_users)).astype(np.int64)
        past = data.histories(rows)
        spans = list(zip(past.offset[:-1].tolist(), past.offset[1:].tolist(), strict=True))
        raw, types = original.item_ids, data.manifest.event_types
        codes = None if past.event is None else past.event.tolist()
        asked: dict[str, Any] = {
            "histories": [[raw[item - 1] for item in past.item[a:b].tolist()] for a, b in spans],
            "times": [past.timestamp[a:b].tolist() for a, b in spans],
            "events": codes
            and [[types[code] if code >= 0 else None for code in codes[a:b]] for a, b in spans],
        }
        same = _same(copy.recommend(**asked), original.recommend(**asked))
        if same and users:
            names = [data.user_ids[row] for row in rows.tolist()]
            same = _same(copy.recommend(names), original.recommend(names))
    except (FindRecError, RuntimeError, LookupError, ValueError) as error:
        raise FindRecError(f"{original.config.name} cannot be exported{_hint(users)}: {error}") from error
    if not same:
        raise FindRecError(
            f"{original.config.name} cannot be exported{_hint(users)}: its lists would differ from those of "
            "the run"
        )


def _same(one: Lists[Recommended], other: Lists[Recommended]) -> bool:
    """Whether lists are equal to the last digit; NaN in a column of the items equals NaN."""
    return repr(one) == repr(other)  # the shortest text that a number is read back from


def _hint(users: bool) -> str:
    return "" if users else " without its users (try --users, which includes their histories)"
