"""Recipes of small local files, and the contents of folders."""

from __future__ import annotations

import gzip
from pathlib import Path
from typing import Any

import pyarrow as pa

from findrec.datasets.folder.data_folder import DataFolder
from findrec.datasets.sources.recipe import Features, Recipe, parse_recipe


def recipe_tree(**keys: Any) -> dict[str, Any]:
    """A recipe as plain values, with one file `log`; `files` replaces its files, other keys the recipe's."""
    files = keys.pop("files", {"log": {"member": "log.csv"}})
    tree = {
        "name": "mine",
        "title": "t",
        "licence": "l",
        "source": "s",
        "sources": {"files": [{"path": ".", "files": files}]},
        "events": "SELECT * FROM read_csv({log})",
    }
    return tree | keys


def small_recipe(folder: Path, /, **keys: Any) -> Recipe:
    """The recipe of `recipe_tree` for files in `folder`."""
    return parse_recipe(recipe_tree(**keys), "test", folder)


def local_recipe(recipe: Recipe, folder: Path, number: int = 0, **changes: Any) -> Recipe:
    """A recipe with only one location per source, read from a local folder, without features."""
    sources = {}
    for name, locations in recipe.sources.items():
        location = locations[number]
        default = str(location.url).rsplit("/", 1)[-1]
        files = {
            key: file.model_copy(update={"sha256": None, "member": file.member or default})
            for key, file in location.files.items()
        }
        local = {"url": None, "package": None, "version": None, "path": str(folder), "files": files}
        sources[name] = [location.model_copy(update=local)]
    return recipe.model_copy(update={"sources": sources, "features": Features(), **changes})


def events_by_user(folder: DataFolder) -> dict[str, list[tuple[str, int]]]:
    """(raw item, timestamp) of each user in the folder's order."""
    raw, events = folder.items["raw"].to_pylist(), {}
    for row, user in enumerate(folder.user_ids):
        history = folder.histories([row])
        items = [raw[item - 1] for item in history.item]
        events[user] = list(zip(items, history.timestamp.tolist(), strict=True))
    return events


def compress(suffix: str, data: bytes) -> bytes:
    """Compress data as `.gz` or `.zst`; other suffixes leave it unchanged."""
    if suffix == ".gz":
        return gzip.compress(data, mtime=0)
    if suffix != ".zst":
        return data
    sink = pa.BufferOutputStream()
    with pa.CompressedOutputStream(sink, "zstd") as stream:
        stream.write(data)
    return bytes(sink.getvalue())


def contents(folder: Path) -> dict[str, bytes]:
    """The bytes of every file in a folder, by relative path."""
    return {str(p.relative_to(folder)): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}
