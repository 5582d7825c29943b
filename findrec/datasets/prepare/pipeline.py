"""`findrec prepare`: make the data folder of a recipe, or reuse an existing one.

Fetches the files, orders the events, encodes the features and writes the folder.
"""

from __future__ import annotations

import shutil
from contextlib import suppress
from pathlib import Path

import duckdb

from findrec.config import DataConfig
from findrec.datasets.encoders.make_features import (
    ModalityFeatures,
    add_feature,
    encoding_folder,
    feature_sources,
    has_files,
    make_feature,
    should_make,
)
from findrec.datasets.folder.configured import data_folder_of, open_data_folder
from findrec.datasets.folder.data_folder import DataFolder
from findrec.datasets.folder.manifest import MANIFEST_NAME, Manifest, read_manifest, repair_hint
from findrec.datasets.folder.overview import overview
from findrec.datasets.folder.remote import is_remote
from findrec.datasets.folder.writer import (
    FolderInput,
    cannot_write,
    undo_killed,
    write_folder,
    writing,
)
from findrec.datasets.prepare.event_log import EventLog
from findrec.datasets.prepare.growing import Parent, inherited_features
from findrec.datasets.sources.bad_rows import explain
from findrec.datasets.sources.duckdb_engine import SQL_ERRORS, Limits, Stopwatch
from findrec.datasets.sources.fetch import fetch_source
from findrec.datasets.sources.recipe import Recipe, load_recipe
from findrec.errors import FindRecError
from findrec.files import beside, remove_abandoned, sha256_file
from findrec.locks import remove_abandoned_lock
from findrec.progress import format_seconds, say, warn

WARN_TIE_RATE = 0.05  # above it `prepare` reports that ties keep the order of the source
_FOLDER_FILES = {MANIFEST_NAME, "items.parquet", "users.parquet", "shards", "features"}


def _changed_source(recipe: Recipe, manifest: Manifest) -> Path | None:
    """Return a local source file that changed after the folder was made; deleted files are ignored."""
    hashes = {entry.sha256 for entry in manifest.sources}
    used = {entry.place for entry in manifest.sources}
    for location in (location for locations in recipe.sources.values() for location in locations):
        if location.path is None or str(location) not in used:
            continue
        root = recipe.folder / Path(location.path).expanduser()
        for file in location.files.values():
            for path in sorted(root.glob(file.member)) if file.member else [root]:
                if path.is_file() and sha256_file(path, show=True) not in hashes:
                    return path
    for name, spec in recipe.features.by_modality().items():
        if not has_files(spec, recipe.folder):
            continue
        known = {e.place: e.sha256 for e in manifest.sources if e.source == f"features.{name}"}
        for entry in feature_sources(name, spec, recipe.folder):
            if known.get(entry.place, entry.sha256) != entry.sha256:
                return Path(entry.place)
    return None


def _with_optional(recipe: Recipe, data: DataFolder) -> DataFolder:
    """Add the optional features whose files have appeared since the folder was made."""
    for name, spec in recipe.features.by_modality().items():
        if name not in data.modalities and should_make(spec, recipe.folder):
            scratch = encoding_folder(data.path)
            modality = make_feature(name, spec, data.items, recipe.folder, scratch=scratch)
            data = add_feature(data.path, modality)
            shutil.rmtree(scratch, ignore_errors=True)
    return data


def _existing(
    recipe: Recipe, folder: Path, limit_users: int | None, parent: Parent | None
) -> DataFolder | None:
    """Open the folder if it was made from this recipe; `FindRecError` if from another, or damaged."""
    if not folder.exists():
        return None
    if not folder.is_dir():
        raise FindRecError(f"{folder} is a file; choose a folder for the data set")
    if not any(folder.iterdir()):
        return None
    manifest, recipe_sha256 = read_manifest(folder), recipe.sha256(limit_users)
    if parent is not None and parent.folder.path.resolve() == folder.resolve():  # grown in place
        same = manifest.recipe_sha256 == recipe_sha256 and _changed_source(recipe, manifest) is None
        return parent.folder if same else None
    if parent is not None and manifest.parent != parent.entry:
        raise FindRecError(
            f"{folder} was not grown from {parent.folder.path} as it is now. Choose another folder, or "
            "replace it with --force"
        )
    if manifest.recipe_sha256 != recipe_sha256:
        raise FindRecError(
            f"{folder} was made from another recipe, or another version of {manifest.recipe!r} (or other "
            f"options). {repair_hint(recipe.name)}, or choose another folder"
        )
    if (changed := _changed_source(recipe, manifest)) is not None:
        raise FindRecError(
            f"{changed} has changed since {folder} was made. {repair_hint(recipe.name)}, or keep its item "
            f"ids with: findrec prepare {recipe.name} --grow {folder}"
        )
    return _with_optional(recipe, DataFolder.open(folder))


def _modalities(folder: Path) -> list[str]:
    """Modalities of a folder that will be replaced; empty if it cannot be read."""
    try:
        return [entry.modality for entry in read_manifest(folder).features]
    except FindRecError:
        return []


def check_replaceable(folder: Path) -> None:
    """Raise `FindRecError` if `folder` is a file, or contains other files than those of a data set."""
    if folder.exists() and not folder.is_dir():
        raise FindRecError(f"{folder} is a file; choose a folder for the data set")
    present = {path.name for path in folder.iterdir()} if folder.is_dir() else set()
    partial = f".{MANIFEST_NAME}.part-"  # may have been left by a killed process
    foreign = [name for name in sorted(present - _FOLDER_FILES) if not name.startswith(partial)]
    if foreign:
        raise FindRecError(
            f"{folder} contains {foreign[0]!r}, which does not belong to a data folder: choose an empty or "
            "new folder"
        )


def prepare(
    recipe: Recipe,
    folder: Path | str,
    *,
    force: bool = False,
    limit_users: int | None = None,
    limits: Limits | None = None,
    stopwatch: Stopwatch | None = None,
    grow: Path | None = None,
) -> DataFolder:
    """Make the data folder of a recipe, or open it if it already exists.

    Args:
        recipe: The recipe.
        folder: Path of the data folder, which appears only once it is complete.
        force: Replace an existing data folder; a folder with any other files is never touched.
        limit_users: Keep only the first users and their items, to try out a recipe.
        limits: Resources that may be used; default: those of the environment.
        stopwatch: Receives the seconds of each stage.
        grow: An earlier data folder of this recipe (possibly `folder` itself) whose items keep their ids and
            features (`findrec.datasets.prepare.growing`).
    """
    if is_remote(folder):
        raise FindRecError(f"a data folder is written to a local path, not to {folder}: copy it there later")
    folder = Path(folder)
    _remove_abandoned(folder, limits)
    if not force and (existing := _existing(recipe, folder, limit_users, _parent(recipe, grow))) is not None:
        return existing
    check_replaceable(folder)
    with writing(folder):
        parent = _parent(recipe, grow)  # read again: another process may have written while this one waited
        if not force and (existing := _existing(recipe, folder, limit_users, parent)) is not None:
            return existing
        check_replaceable(folder)
        limits, stopwatch = limits or Limits.of(), stopwatch or Stopwatch()
        return _prepare(recipe, folder, limit_users, limits, stopwatch, parent)


def _remove_abandoned(folder: Path, limits: Limits | None) -> None:
    """Remove what killed processes left beside a data folder, which may be as large as the data."""
    scratch_parent = folder.parent if limits is None or limits.scratch is None else limits.scratch
    with suppress(OSError):  # a data set may be on a disk that is read-only
        remove_abandoned(scratch_parent / folder.name, "scratch")
        undo_killed(folder)
        remove_abandoned_lock(folder)


def _parent(recipe: Recipe, grow: Path | None) -> Parent | None:
    return None if grow is None else Parent.open(Path(grow), recipe)


def _prepare(
    recipe: Recipe,
    folder: Path,
    limit_users: int | None,
    limits: Limits,
    stopwatch: Stopwatch,
    parent: Parent | None,
) -> DataFolder:
    scratch_parent = limits.scratch or folder.parent
    old_modalities = _modalities(folder)
    try:
        scratch_parent.mkdir(parents=True, exist_ok=True)
        scratch = beside(scratch_parent / folder.name, "scratch")
        scratch.mkdir()
    except OSError as error:
        raise cannot_write(folder, error) from error
    say(f"prepare {recipe.name} ({recipe.title}) in {folder}; {limits}, temporary files in {scratch_parent}")
    try:
        _make(recipe, folder, scratch, limit_users, limits, stopwatch, parent)
    except duckdb.OutOfMemoryException as error:
        raise FindRecError(
            f"{recipe.name}: {limits} and the free disk space of {scratch_parent}, which is not enough "
            f"({str(error).splitlines()[0]}). Allow more memory (--memory-gib, FINDREC_MEMORY_GIB), use "
            "fewer threads (--threads), or a larger disk for temporary files (--scratch, FINDREC_SCRATCH)"
        ) from error
    except duckdb.IOException as error:
        raise FindRecError(f"cannot work on {recipe.name} in {scratch.parent}: {error}") from error
    except SQL_ERRORS as error:
        raise FindRecError(f"recipe {recipe.name}: the data cannot be read: {explain(error)}") from error
    finally:
        shutil.rmtree(scratch, ignore_errors=True)
    data = DataFolder.open(folder, verify=False)  # the files were hashed when written
    if lost := [name for name in old_modalities if name not in data.modalities]:
        warn(
            f"{', '.join(lost)}: not in the recipe, so no longer in {folder}: add it again with findrec "
            "features"
        )
    count, seconds = data.manifest.num_events, stopwatch.total
    say(f"{count:,} events in {format_seconds(seconds)} ({count / seconds:,.0f} events/s: {stopwatch})")
    for line in overview(data).lines():
        say(line)
    return data


def _make(
    recipe: Recipe,
    folder: Path,
    scratch: Path,
    limit: int | None,
    limits: Limits,
    stopwatch: Stopwatch,
    parent: Parent | None,
) -> None:
    with stopwatch.stage("fetch"):
        fetched = [
            fetch_source(name, locations, recipe.folder, max_ratio=recipe.max_unpack_ratio)
            for name, locations in recipe.sources.items()
        ]
    log = EventLog(recipe, fetched, scratch, limit, limits, stopwatch, parent)
    try:
        with stopwatch.stage("items"):
            items = log.items()
        say(f"{len(log.length):,} users, {items.num_rows:,} items, {int(log.length.sum()):,} events")
        with stopwatch.stage("features"):
            modalities: list[ModalityFeatures] = []
            for name, spec in recipe.features.by_modality().items():
                if should_make(spec, recipe.folder):
                    existing = None if parent is None else parent.existing_features(name, items)
                    encoding = encoding_folder(folder)
                    modalities.append(
                        make_feature(name, spec, items, recipe.folder, scratch=encoding, existing=existing)
                    )
            features = [modality.feature for modality in modalities]
            if parent is not None:
                encoded = {feature.modality for feature in features}
                features += inherited_features(parent, items.num_rows, encoded)
        with stopwatch.stage("write"):
            manifest = write_folder(
                folder,
                FolderInput(
                    recipe=recipe.name,
                    recipe_sha256=recipe.sha256(limit),
                    split=log.split,
                    filtered=log.filtered,
                    users=log.users(),
                    items=items,
                    blocks=log.blocks(),
                    features=features,
                    sources=[entry for source in fetched for entry in source.entries]
                    + [entry for modality in modalities for entry in modality.entries],
                    event_types=log.event_types(),
                    parent=None if parent is None else parent.entry,
                ),
            )
        shutil.rmtree(encoding_folder(folder), ignore_errors=True)  # its vectors are now in the data folder
        if manifest.duplicates and recipe.duplicates == "keep":
            warn(
                f"{recipe.name}: {manifest.duplicates:,} of {manifest.num_events:,} events repeat another's "
                "user, item and time; they are kept (`duplicates: drop` removes them)"
            )
        if recipe.ties == "row" and recipe.split.unit == "event" and manifest.tie_rate > WARN_TIE_RATE:
            warn(
                f"{manifest.tie_rate:.1%} of the events share their time with another of the same user and "
                "keep the order of the source. If that order leaks information (e.g. sorted by item), set "
                "`ties: shuffle`"
            )
    finally:
        log.close()


def open_or_prepare(config: DataConfig) -> DataFolder:
    """Open the data set of a run; without `data.folder` it is prepared on first use."""
    if config.folder is not None:
        return open_data_folder(config)
    return prepare(load_recipe(config.recipe), data_folder_of(config))
