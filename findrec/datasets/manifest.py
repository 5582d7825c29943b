"""`manifest.json`: what a prepared data folder holds, and the sha256 of all of it.

The manifest is written last, so a folder without a valid one was never finished and is not trusted. It
holds no dates or machine names: preparing the same recipe twice gives the same bytes.
"""

from __future__ import annotations

import hashlib
import json
import os
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ConfigDict, ValidationError

from findrec.errors import FindRecError
from findrec.progress import progress

SCHEMA_VERSION = 1
MANIFEST_NAME = "manifest.json"


class Entry(BaseModel):
    """Base of the manifest's parts: unknown keys are errors."""

    model_config = ConfigDict(extra="forbid", frozen=True)


class SourceEntry(Entry):
    """One raw file the folder was made from."""

    source: str  # the recipe's name for the file; features.MODALITY for what features were made from
    place: str  # where it came from
    sha256: str  # of the file; of a folder of images, of the list of their names and sizes
    bytes: int


class ShardEntry(Entry):
    """One packed tar of users' histories."""

    name: str  # relative to the folder
    sha256: str
    bytes: int
    first_user: int
    users: int
    events: int


class FeatureEntry(Entry):
    """One modality's table of item features."""

    modality: str
    file: str  # relative to the folder; its sha256 is in `Manifest.files`
    dim: int
    encoder: str
    weights_sha256: str  # of the encoder's weight file; empty where features came without an encoder
    revision: str = ""  # release of the encoder, where it has any
    normalised: bool  # every present row has Euclidean norm 1
    missing: int  # items without this modality


class ParentEntry(Entry):
    """The data folder that this one was grown from: its items have the ids 1 .. num_items here too."""

    manifest_sha256: str
    num_items: int


class Manifest(Entry):
    """Everything that is known about a prepared folder. Rates are shares between 0 and 1."""

    schema_version: int = SCHEMA_VERSION
    recipe: str
    recipe_sha256: str
    events_sha256: str  # of the canonical event table: ordered users, items, timestamps and extras
    sources: list[SourceEntry]
    num_users: int
    num_items: int  # ids 1 .. num_items; 0 is padding
    num_events: int
    longest: int  # events of the longest history
    repeat_rate: float  # training events whose item the same user had before
    tie_rate: float  # events that share their timestamp with another event of the same user
    tied_last_rate: float  # users whose last timestamp holds several events
    duplicates: int = 0  # events that repeat another's user, item, timestamp (and type)
    split: dict[str, Any]  # the keys of `findrec.datasets.splits.Split`, with its cut times
    filtered: dict[str, int] = {}  # events `read`, and how many each filter of the recipe left out
    dtypes: dict[str, str]  # column of a shard member -> numpy dtype
    event_types: list[str]  # name of each code in the `event` column; empty without one
    shards: list[ShardEntry]
    features: list[FeatureEntry]
    files: dict[str, str]  # every other file -> sha256
    parent: ParentEntry | None = None


def sha256_file(path: Path, *, show: bool = False) -> str:
    """Hex sha256 of a file, read in pieces of 4 MiB; with `show` a bar where it takes more than a second."""
    digest = hashlib.sha256()
    size = path.stat().st_size
    with (
        path.open("rb") as stream,
        progress(f"hash {path.name}", total=size, unit="bytes", show=show, after_s=1.0) as bar,
    ):
        while piece := stream.read(1 << 22):
            digest.update(piece)
            bar.advance(len(piece))
    return digest.hexdigest()


def write_manifest(folder: Path, manifest: Manifest) -> None:
    """Write `manifest.json`, in place of an older one at once; callers do this after every other file is
    complete.
    """
    text = json.dumps(manifest.model_dump(mode="json"), indent=1, sort_keys=True) + "\n"
    part = folder / f".{MANIFEST_NAME}.part"
    with part.open("w", encoding="utf-8") as stream:
        stream.write(text)
        stream.flush()
        os.fsync(stream.fileno())
    part.replace(folder / MANIFEST_NAME)


SYNTHETIC = "synthetic-"  # begins the recipe's name where a profile made the folder


def how_to_mend(name: str) -> str:
    """The sentence that ends every message about a folder that cannot be used."""
    if name.startswith(SYNTHETIC):
        return f"Make it again with: findrec synthesize --profile {name.removeprefix(SYNTHETIC)} --force"
    return f"Make it again with: findrec prepare {name} --force"


def read_manifest(folder: Path) -> Manifest:
    """The manifest of a folder; `FindRecError` where it is missing, damaged or of another version."""
    path = folder / MANIFEST_NAME
    mend = how_to_mend(folder.name)
    if not folder.is_dir():
        raise FindRecError(
            f"no data folder at {folder}. Make it with: findrec prepare {folder.name} "
            "(or set data.folder to where it is)"
        )
    try:
        tree = json.loads(path.read_text(encoding="utf-8"))
        if isinstance(tree, dict) and tree.get("schema_version") != SCHEMA_VERSION:
            raise FindRecError(
                f"{path} has schema version {tree.get('schema_version')!r}, this FindRec reads "
                f"{SCHEMA_VERSION}. {mend}"
            )
        return Manifest.model_validate(tree)
    except FileNotFoundError:
        raise FindRecError(f"{folder} has no {MANIFEST_NAME}: it was never finished. {mend}") from None
    except (json.JSONDecodeError, ValidationError, UnicodeDecodeError) as error:
        raise FindRecError(f"{path} is damaged ({str(error).splitlines()[0]}). {mend}") from None
    except OSError as error:
        raise FindRecError(f"cannot read {path}: {error.strerror or error}") from None
