"""`manifest.json`: the contents of a data folder with the sha256 of every file.

The manifest is written last, so a folder without a valid one is incomplete and not trusted. It has no dates
or machine names: preparing the same recipe twice gives the same bytes.
"""

from __future__ import annotations

import json
from pathlib import Path
from shlex import quote
from typing import Annotated, Any

from pydantic import AfterValidator, BaseModel, ConfigDict, ValidationError

from findrec.errors import FindRecError
from findrec.files import read_json, replacing
from findrec.text import redacted

SCHEMA_VERSION = 1
MANIFEST_NAME = "manifest.json"


class Entry(BaseModel):
    """Base class of the manifest's parts; unknown keys are errors."""

    model_config = ConfigDict(extra="forbid", frozen=True)


class SourceEntry(Entry):
    """One raw file from which the folder was made."""

    source: str  # name of the file in the recipe, or features.MODALITY
    place: Annotated[str, AfterValidator(redacted)]  # from which it was read, without credentials
    sha256: str  # of the file; for a folder of images, of the list of their names and sizes
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
    weights_sha256: str  # of the encoder's weight file; empty for precomputed features
    revision: str = ""  # of the encoder, if known
    normalised: bool  # every present row has Euclidean norm 1
    missing: int  # items without this modality


class ParentEntry(Entry):
    """The data folder from which this one was grown; its items keep their ids 1 .. num_items."""

    manifest_sha256: str
    num_items: int


class Manifest(Entry):
    """Description of a data folder. Rates are shares between 0 and 1."""

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
    split: dict[str, Any]  # the keys of `findrec.datasets.folder.splits.Split`, with its cut times
    filtered: dict[str, int] = {}  # events `read`, and events removed by each filter of the recipe
    dtypes: dict[str, str]  # column of a shard member -> numpy dtype
    event_types: list[str]  # name of each code in the `event` column; empty without one
    shards: list[ShardEntry]
    features: list[FeatureEntry]
    files: dict[str, str]  # every other file -> sha256
    parent: ParentEntry | None = None


def write_manifest(folder: Path, manifest: Manifest) -> None:
    """Write `manifest.json` atomically; callers do this once every other file is complete."""
    text = json.dumps(manifest.model_dump(mode="json"), indent=1, sort_keys=True) + "\n"
    with replacing(folder / MANIFEST_NAME, sync=True) as part:
        part.write_text(text, encoding="utf-8")


SYNTHETIC = "synthetic-"  # prefix of the recipe's name in synthetic data folders


def repair_hint(name: str) -> str:
    """End of error messages about a folder that cannot be used: how to make it again."""
    if name.startswith(SYNTHETIC):
        profile = quote(name.removeprefix(SYNTHETIC))
        return f"Make it again with: findrec synthesize --profile {profile} --force"
    return f"Make it again with: findrec prepare {quote(name)} --force"


def read_manifest(folder: Path) -> Manifest:
    """Read the manifest of a folder; `FindRecError` if it is missing, damaged or of another version."""
    path = folder / MANIFEST_NAME
    hint = repair_hint(folder.name)
    if not folder.is_dir():
        raise FindRecError(
            f"no data folder at {folder}. Make it with: findrec prepare {quote(folder.name)} "
            "(or set data.folder to where it is)"
        )
    try:
        tree = read_json(path)
        version = tree.get("schema_version") if isinstance(tree, dict) else SCHEMA_VERSION
        if version != SCHEMA_VERSION:
            newer = isinstance(version, int) and version > SCHEMA_VERSION
            raise FindRecError(
                f"{path} has schema version {version!r}, this FindRec reads {SCHEMA_VERSION}. "
                f"{'Update FindRec, or use another folder' if newer else hint}"
            )
        return Manifest.model_validate(tree)
    except FileNotFoundError:
        raise FindRecError(f"{folder} has no {MANIFEST_NAME}: it is incomplete. {hint}") from None
    except ValidationError as error:
        first = error.errors()[0]
        key = ".".join(map(str, first["loc"]))
        cause = "is damaged, or written by a newer version of FindRec"
        raise FindRecError(f"{path} {cause} ({key}: {first['msg']}). {hint}") from None
    except ValueError as error:
        if isinstance(error, FindRecError):
            raise
        raise FindRecError(f"{path} is damaged ({error}). {hint}") from None
    except OSError as error:
        raise FindRecError(f"cannot read {path}: {error.strerror or error}") from None
