"""Recipes: YAML files that describe the sources of a data set and the SQL that selects its events and items.

Each source lists locations of the same files, which are tried in order; a location whose files have another
format has its own SQL. In the SQL, `{name}` stands for the path (or table) of the file `name`.
"""

from __future__ import annotations

import hashlib
import json
import re
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import Field, model_validator

from findrec.datasets.folder.splits import Split
from findrec.errors import FindRecError, suggest
from findrec.paths import find_asset
from findrec.schema import Part, read_mapping, validate

FOLDER_VERSION = 3  # increased when `prepare` produces other data from the same recipe
MODALITY = r"^[a-z][a-z0-9_]*$"
PLACEHOLDER = re.compile(r"\{([a-z_]\w*)\}")


class SourceFile(Part):
    """One file of a source."""

    member: str = ""  # path inside the archive, package or folder (for folders, a glob)
    sha256: str | None = Field(None, pattern=r"^[0-9a-f]{64}$")
    # With a format, the SQL's `{name}` is a table (findrec.datasets.sources.formats), else the path.
    format: (
        Literal["csv", "tsv", "jsonl", "loose_json", "parquet", "sequences", "recbole", "webdataset"] | None
    ) = None
    columns: dict[str, str] | None = None  # name -> SQL type
    header: bool | None = None  # of csv and tsv; default true
    encoding: str | None = None  # default UTF-8
    quote: str | None = Field(None, max_length=1)  # of csv (default "), tsv and recbole (default: none)
    escape: str | None = Field(None, max_length=1)  # of a quote inside quotes; default: the quote itself

    @model_validator(mode="after")
    def _fits_format(self) -> SourceFile:
        options = {"columns": self.columns, "header": self.header, "encoding": self.encoding}
        options |= {"quote": self.quote, "escape": self.escape}
        if self.format is None and any(value is not None for value in options.values()):
            raise ValueError(f"{', '.join(options)} need a format (without one the SQL reads the file)")
        if (self.quote, self.escape) != (None, None) and self.format not in ("csv", "tsv", "recbole"):
            raise ValueError("quote and escape are options of csv, tsv and recbole")
        if self.header is not None and self.format not in ("csv", "tsv"):
            raise ValueError("header is an option of csv and tsv")
        if self.header is False and not self.columns:
            raise ValueError("header: false needs columns")
        if self.columns and self.format not in ("csv", "tsv", "jsonl", "loose_json", "webdataset"):
            raise ValueError(f"a {self.format} file defines its own columns")
        if self.encoding and self.format in ("jsonl", "loose_json", "parquet", "webdataset"):
            raise ValueError(f"a {self.format} file is UTF-8")
        return self


class SourceLocation(Part):
    """A location of a source's files: exactly one of `url`, `package` and `path`."""

    url: str | None = Field(None, pattern=r"^(https?|s3|gs)://")  # a zip or tar archive, or a single file
    package: str | None = None  # a wheel of the package index, read as an archive and never installed
    version: str | None = None
    path: str | None = None  # a local folder or archive; relative to the recipe
    files: dict[str, SourceFile]
    events: str | None = None  # SQL for the format of these files, instead of the recipe's
    items: str | None = None

    @model_validator(mode="after")
    def _one_kind(self) -> SourceLocation:
        if sum(kind is not None for kind in (self.url, self.package, self.path)) != 1:
            raise ValueError("a location has exactly one of url, package and path")
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
    """Minimum events of each user and item; what has fewer is removed until all have enough."""

    users: int = Field(1, ge=1)
    items: int = Field(1, ge=1)


class ImageFeature(Part):
    """Embeddings of the items' images."""

    path: str  # a folder or an uncompressed tar; relative to the recipe, or else to FindRec's home
    encoder: str = "efficientnet-lite0"
    column: str | None = None  # item column with each file's path or URL; default: files named by raw id
    optional: bool = False  # skip the modality as long as the path does not exist


class ReadyFeature(Part):
    """Precomputed vectors in a .npy, .safetensors or Parquet file."""

    path: str  # relative to the recipe, or else to FindRec's home
    ids: str | None = None  # a CSV, TSV, Parquet or text file with the raw item id of each row
    id_column: str | None = None  # of that file, or of a Parquet file of vectors; default `item`
    vector_column: str | None = None  # of a Parquet file; default `vector`
    encoder: str = ""  # name of the model that made them, for the manifest
    optional: bool = False


FeatureSpec = TextFeature | ImageFeature | ReadyFeature


class Features(Part):
    """Feature tables of a data set; `ready` has precomputed ones by modality."""

    text: TextFeature | None = None
    image: ImageFeature | None = None
    ready: dict[Annotated[str, Field(pattern=MODALITY)], ReadyFeature] = Field({})

    @model_validator(mode="after")
    def _distinct(self) -> Features:
        for name in ("text", "image"):
            if getattr(self, name) and name in self.ready:
                raise ValueError(f"{name!r} is both encoded and ready: keep one of the two")
        return self

    def by_modality(self) -> dict[str, FeatureSpec]:
        """All features by modality."""
        specs = {"text": self.text, "image": self.image, **self.ready}
        return {name: spec for name, spec in specs.items() if spec is not None}


class Recipe(Part):
    """A data set: its sources, the SQL of its events and items, filters, split and features.

    The SQL of `events` selects user, item, timestamp and optionally event and value; that of `items` selects
    item, title, text and optionally category, image and available_from.
    """

    name: str = Field(pattern=r"^[a-z0-9][a-z0-9._-]*$")
    title: str
    licence: str
    source: str  # authors, publication, reference to cite
    sources: dict[str, list[SourceLocation]]
    events: str = ""
    items: str = ""
    ties: Literal["row", "shuffle"] = "row"  # order of a user's events with equal timestamps
    seed: int = 0  # of the shuffle
    split: Split = Split()
    max_bad_rows: float = Field(0.001, ge=0, le=1)  # largest tolerated share of a file's rows
    max_unpack_ratio: float = Field(200, ge=1)  # unpacked by packed size of a compressed file
    min_value: float | None = None  # remove events with a lower or missing `value`
    duplicates: Literal["keep", "drop"] = "keep"  # drop: keep the first of equal events
    k_core: KCore | None = None  # with a global_temporal split, of the training events only
    min_events: int = Field(1, ge=1)  # remove users with fewer
    unmet_items: Literal["keep", "drop"] = "drop"  # items of the items SQL without any event
    features: Features = Features()
    folder: Path = Field(Path("."), exclude=True)  # of the recipe file, for relative paths

    @model_validator(mode="after")
    def _check(self) -> Recipe:
        if not self.sources or not all(self.sources.values()):
            raise ValueError("sources needs at least one source with at least one location")
        for source, locations in self.sources.items():
            if any(set(location.files) != set(locations[0].files) for location in locations):
                raise ValueError(f"all locations of source {source!r} must have the same file names")
        names = [name for locations in self.sources.values() for name in locations[0].files]
        if len(set(names)) < len(names):
            raise ValueError("file names must differ between sources")
        every = [location for locations in self.sources.values() for location in locations]
        if not self.events and any(not location.events for location in every):
            raise ValueError("events: SQL is missing")
        queries = [self.events, self.items]
        queries += [sql for location in every for sql in (location.events, location.items) if sql]
        for name in (name for sql in queries for name in PLACEHOLDER.findall(sql)):
            if name not in names:
                raise ValueError(f"the SQL refers to an unknown file {{{name}}}{suggest(name, names)}")
        return self

    def sha256(self, limit_users: int | None = None) -> str:
        """Hash of all settings that influence what `prepare` writes."""
        recipe = self.model_dump(mode="json", exclude={"title", "licence", "source", "features"})
        if recipe["split"]["last"] is None:  # keeps the hash of folders made before this key existed
            del recipe["split"]["last"]
        recipe["features"] = {
            name: spec.model_dump(mode="json")
            for name, spec in self.features.by_modality().items()
            # Optional features are added to the folder once their files exist.
            if isinstance(spec, TextFeature) or not spec.optional
        }
        tree = {"recipe": recipe, "version": FOLDER_VERSION, "limit_users": limit_users}
        return hashlib.sha256(json.dumps(tree, sort_keys=True).encode()).hexdigest()


def parse_recipe(tree: dict[str, Any], source: str, folder: Path) -> Recipe:
    """Validate a recipe given as plain values; `FindRecError` lists every problem with its key."""
    if "folder" in tree:
        raise FindRecError(f"{source}: unknown key 'folder' (findrec prepare --folder sets where to write)")
    return validate(Recipe, {**tree, "folder": folder}, source)


def load_recipe(name_or_path: str) -> Recipe:
    """Read a recipe by name (`ml-100k` is `datasets/ml-100k.yaml`) or by path."""
    path = find_asset(str(name_or_path), "datasets")
    return parse_recipe(read_mapping(path), str(path), path.parent)
