"""`findrec prepare`: a recipe's raw files become a data folder.

Fetch the files, put the events into their final order, encode the texts, write the folder; what is there
already is used again.
"""

from __future__ import annotations

import shutil
from pathlib import Path

import duckdb

from findrec.config import DataConfig
from findrec.datasets.engine import Limits, Stopwatch
from findrec.datasets.eventlog import EventLog
from findrec.datasets.fetch import fetch_source
from findrec.datasets.folder import DataFolder
from findrec.datasets.growing import Parent, carried_over
from findrec.datasets.make_features import (
    add_feature,
    feature_sources,
    is_there,
    is_wanted,
    make_feature,
    scratch_of,
)
from findrec.datasets.manifest import MANIFEST_NAME, Manifest, how_to_mend, read_manifest, sha256_file
from findrec.datasets.recipe import Recipe, load_recipe
from findrec.datasets.remote import is_remote
from findrec.datasets.writer import FolderInput, beside, cannot_write, write_folder
from findrec.errors import FindRecError
from findrec.paths import resolve
from findrec.progress import format_seconds, say

TOLD_TIE_RATE = 0.05  # above it `prepare` says that the order inside ties is the source's
_OURS = {MANIFEST_NAME, f".{MANIFEST_NAME}.part", "items.parquet", "users.parquet", "shards", "features"}


def _changed_source(recipe: Recipe, manifest: Manifest) -> Path | None:
    """A local source file that is not what the folder was made from. One that is gone changes nothing."""
    told = {entry.sha256 for entry in manifest.sources}
    used = {entry.place for entry in manifest.sources}
    for place in (place for places in recipe.sources.values() for place in places):
        if place.path is None or str(place) not in used:
            continue
        root = recipe.folder / Path(place.path).expanduser()
        for file in place.files.values():
            for path in sorted(root.glob(file.member)) if file.member else [root]:
                if path.is_file() and sha256_file(path, show=True) not in told:
                    return path
    for name, spec in recipe.features.wanted().items():
        places = {
            entry.place: entry.sha256 for entry in manifest.sources if entry.source == f"features.{name}"
        }
        for entry in feature_sources(name, spec, recipe.folder) if is_there(spec, recipe.folder) else []:
            if places.get(entry.place, entry.sha256) != entry.sha256:
                return Path(entry.place)
    return None


def _with_optional(recipe: Recipe, data: DataFolder) -> DataFolder:
    """The folder with those optional features whose files have come since it was made."""
    for name, spec in recipe.features.wanted().items():
        if name not in data.modalities and is_wanted(spec, recipe.folder):
            scratch = scratch_of(data.path)
            data = add_feature(
                data.path, make_feature(name, spec, data.items, recipe.folder, scratch=scratch)
            )
            shutil.rmtree(scratch, ignore_errors=True)
    return data


def _existing(
    recipe: Recipe, folder: Path, recipe_sha256: str, parent: Parent | None = None
) -> DataFolder | None:
    """The folder if it holds this very recipe; `FindRecError` if it holds something else or is damaged."""
    if not folder.exists():
        return None
    if not folder.is_dir():
        raise FindRecError(f"{folder} is a file; give a folder to write the data set to")
    if not any(folder.iterdir()):
        return None
    manifest = read_manifest(folder)
    if parent is not None and parent.folder.path.resolve() == folder.resolve():  # grown in place
        same = manifest.recipe_sha256 == recipe_sha256 and _changed_source(recipe, manifest) is None
        return parent.folder if same else None
    if parent is not None and manifest.parent != parent.entry:
        raise FindRecError(
            f"{folder} was not grown from {parent.folder.path} as it is now. Give another folder, or replace "
            "it with --force"
        )
    if manifest.recipe_sha256 != recipe_sha256:
        raise FindRecError(
            f"{folder} was made from another recipe, or another version of {manifest.recipe!r} (or other "
            f"options). {how_to_mend(recipe.name)}, or give another folder"
        )
    if (changed := _changed_source(recipe, manifest)) is not None:
        raise FindRecError(
            f"{changed} has changed since {folder} was made. {how_to_mend(recipe.name)}, or keep its item "
            f"ids with: findrec prepare {recipe.name} --grow {folder}"
        )
    return _with_optional(recipe, DataFolder.open(folder))


def _modalities(folder: Path) -> list[str]:
    """What a folder that is about to be replaced has; nothing where it cannot be read."""
    try:
        return [entry.modality for entry in read_manifest(folder).features]
    except FindRecError:
        return []


def refuse_strange(folder: Path) -> None:
    """`FindRecError` where a file, or a folder with anything but a data set in it, is in the way."""
    if folder.exists() and not folder.is_dir():
        raise FindRecError(f"{folder} is a file; give a folder to write the data set to")
    if folder.is_dir() and (strange := sorted({p.name for p in folder.iterdir()} - _OURS)):
        raise FindRecError(
            f"{folder} holds {strange[0]!r}, which is no part of a data folder: give an empty or new folder"
        )


def prepare(
    recipe: Recipe,
    folder: Path | str,
    *,
    force: bool = False,
    limit_users: int | None = None,
    limits: Limits | None = None,
    watch: Stopwatch | None = None,
    grow: Path | None = None,
) -> DataFolder:
    """Make the data folder of a recipe, or open it if it is there already.

    `limit_users` keeps the first users only (and the items that they used), for trying a recipe out. With
    `force` a folder of ours is made anew; a folder with anything else in it is never touched. Nothing is at
    `folder` until all of it is complete. `limits` say how much of the machine may be used (default: the
    environment's); `watch` is told the seconds of each stage.

    With `grow`, an earlier data folder of this recipe (which may be `folder` itself), its items keep their
    ids and features and new ones come after them (`findrec.datasets.growing`).
    """
    if is_remote(folder):
        raise FindRecError(f"a data folder is written to a local path, not to {folder}: copy it there then")
    folder = Path(folder)
    recipe_sha256 = recipe.sha256(limit_users)
    parent = None if grow is None else Parent.open(Path(grow), recipe)
    if not force and (ready := _existing(recipe, folder, recipe_sha256, parent)) is not None:
        return ready
    refuse_strange(folder)
    limits = limits or Limits.of()
    watch = watch or Stopwatch()
    place = folder if limits.scratch is None else limits.scratch / folder.name
    had = _modalities(folder)
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        place.parent.mkdir(parents=True, exist_ok=True)
        scratch = beside(place, "scratch")
        scratch.mkdir()
    except OSError as error:
        raise cannot_write(folder, error) from error
    say(f"prepare {recipe.name} ({recipe.title}) in {folder}; {limits}, temporary files in {place.parent}")
    try:
        _make(recipe, folder, scratch, recipe_sha256, limit_users, limits, watch, parent)
    except duckdb.OutOfMemoryException as error:
        raise FindRecError(
            f"{recipe.name}: {limits} and the free disk space of {place.parent}, which is not enough "
            f"({str(error).splitlines()[0]}). Give more (--memory-gib, FINDREC_MEMORY_GIB), fewer threads "
            "(--threads), or a larger disk for temporary files (--scratch, FINDREC_SCRATCH)"
        ) from error
    except duckdb.IOException as error:
        raise FindRecError(f"cannot work on {recipe.name} in {scratch.parent}: {error}") from error
    finally:
        shutil.rmtree(scratch, ignore_errors=True)
    made = DataFolder.open(folder, verify=False)  # it was hashed while it was written
    if lost := [name for name in had if name not in made.modalities]:
        say(
            f"{', '.join(lost)}: not in the recipe, and so no longer in {folder}: add it again with findrec "
            "features"
        )
    events = made.manifest.num_events
    say(f"{events:,} events in {format_seconds(watch.total)} ({events / watch.total:,.0f} events/s: {watch})")
    if late := int((made.valid_start == 0).sum()):
        new = int((made.test_start == 0).sum())
        say(
            f"{late:,} of {made.num_users:,} users have no event before the split's first cut: they are not "
            f"trained on, and {new:,} of them, with none before the second either, are not evaluated"
        )
    return made


def _make(
    recipe: Recipe,
    folder: Path,
    scratch: Path,
    recipe_sha256: str,
    limit: int | None,
    limits: Limits,
    watch: Stopwatch,
    parent: Parent | None,
) -> None:
    with watch.stage("fetch"):
        fetched = [
            fetch_source(name, places, recipe.folder, max_ratio=recipe.max_unpack_ratio)
            for name, places in recipe.sources.items()
        ]
    log = EventLog(recipe, fetched, scratch, limit, limits, watch, parent)
    try:
        with watch.stage("items"):
            items = log.items()
        say(f"{len(log.length):,} users, {items.num_rows:,} items, {int(log.length.sum()):,} events")
        with watch.stage("features"):
            made = [
                make_feature(
                    *(name, spec, items, recipe.folder),
                    scratch=scratch_of(folder),
                    before=None if parent is None else parent.before(name, items),
                )
                for name, spec in recipe.features.wanted().items()
                if is_wanted(spec, recipe.folder)
            ]
            features = [one.feature for one in made]
            if parent is not None:
                features += carried_over(parent, items.num_rows, {feature.modality for feature in features})
        with watch.stage("write"):
            manifest = write_folder(
                folder,
                FolderInput(
                    recipe=recipe.name,
                    recipe_sha256=recipe_sha256,
                    split=log.split,
                    filtered=log.filtered,
                    users=log.users(),
                    items=items,
                    blocks=log.blocks(),
                    features=features,
                    sources=[e for one in fetched for e in one.entries]
                    + [e for one in made for e in one.entries],
                    event_types=log.event_types(),
                    parent=None if parent is None else parent.entry,
                ),
            )
        shutil.rmtree(scratch_of(folder), ignore_errors=True)  # its vectors are in the folder now
        if manifest.duplicates and recipe.duplicates == "keep":
            say(
                f"{recipe.name}: {manifest.duplicates:,} of {manifest.num_events:,} events repeat another's "
                "user, item and time; they are kept (`duplicates: drop` leaves them out)"
            )
        if recipe.ties == "row" and recipe.split.unit == "event" and manifest.tie_rate > TOLD_TIE_RATE:
            say(
                f"{manifest.tie_rate:.1%} of the events share their time with another of the same user and "
                "keep the order of the source. If that order gives something away (sorted by item, say), set "
                "`ties: shuffle`"
            )
    finally:
        log.close()


def data_folder_of(config: DataConfig) -> Path | str:
    """Where a run's data set lies: `data.folder` (path or address), or `data/<recipe>` below the home."""
    if config.folder is not None and is_remote(config.folder):
        return config.folder
    return resolve(config.folder or f"data/{Path(config.recipe).stem}")


def open_or_prepare(config: DataConfig) -> DataFolder:
    """The data set of a run: prepared on first use, or, when `data.folder` is given, just opened."""
    if config.folder is not None:
        return open_data_folder(config)
    return prepare(load_recipe(config.recipe), data_folder_of(config))


def open_data_folder(config: DataConfig, *, verify: bool = True) -> DataFolder:
    """The data set of a run, which is there already; see `DataFolder.open`."""
    return DataFolder.open(data_folder_of(config), verify=verify, cache_bytes=config.cache_bytes)
