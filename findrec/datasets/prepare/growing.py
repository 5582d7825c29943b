"""Grow a data folder: the items of an earlier (parent) folder keep their ids, and new items follow them.

Rows of a model's item table are indexed by item id, so a model trained on the parent is valid for the grown
folder, and a run can start from it (`findrec.training.warm_start`). An item that is in neither the events nor
the items of the new source keeps its id, row and features; it is marked `gone` and never a candidate until it
returns. Event types keep their codes too. Users are numbered anew, as no parameter belongs to a user row.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import duckdb
import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from findrec.datasets.encoders.make_features import ExistingFeatures
from findrec.datasets.folder.data_folder import ALWAYS, DataFolder
from findrec.datasets.folder.features import FeatureInput, scatter_features
from findrec.datasets.folder.manifest import MANIFEST_NAME, ParentEntry
from findrec.datasets.sources.duckdb_engine import fetch_value
from findrec.datasets.sources.recipe import ReadyFeature, Recipe, TextFeature
from findrec.errors import FindRecError
from findrec.files import sha256_file
from findrec.progress import say

_DESCRIPTIONS = ("title", "text", "category", "image")  # kept for items that the source no longer lists


@dataclass(frozen=True)
class Parent:
    """A verified earlier data folder of the same recipe."""

    folder: DataFolder
    entry: ParentEntry  # for the grown folder's manifest

    @staticmethod
    def open(path: Path, recipe: Recipe) -> Parent:
        """Open and verify a folder; `FindRecError` if `recipe` cannot continue its ids and features."""
        folder = DataFolder.open(path, verify=True)
        manifest = folder.manifest
        hint = "Omit --grow to number the items anew"
        if manifest.recipe != recipe.name:
            raise FindRecError(
                f"{path} was made from the recipe {manifest.recipe!r}, so {recipe.name!r} cannot continue "
                f"its item ids. Choose a data folder of {recipe.name!r} to grow. {hint}"
            )
        raw = folder.items["raw"].combine_chunks()
        if len(raw) != manifest.num_items or raw.null_count or len(pc.unique(raw)) != len(raw):
            raise FindRecError(
                f"{path / 'items.parquet'} does not list {manifest.num_items:,} distinct items: its id map "
                f"is damaged. Choose another folder to grow. {hint}"
            )
        encoders = {entry.modality: entry.encoder for entry in manifest.features}
        for modality, spec in recipe.features.by_modality().items():
            if isinstance(spec, ReadyFeature) or encoders.get(modality) == spec.encoder:
                continue
            if modality in encoders or isinstance(spec, TextFeature) or not spec.optional:
                by = f" of {encoders[modality]!r}" if modality in encoders else ""
                raise FindRecError(
                    f"{path} has {'' if by else 'no '}{modality} features{by}, but the recipe "
                    f"{recipe.name!r} needs those of {spec.encoder!r}: old and new items would not be "
                    f"comparable. Set features.{modality} of the recipe to match the folder. {hint}"
                )
        digest = sha256_file(path / MANIFEST_NAME)
        return Parent(folder, ParentEntry(manifest_sha256=digest, num_items=manifest.num_items))

    def existing_features(self, modality: str, items: pa.Table) -> ExistingFeatures | None:
        """The parent's features of a modality, if any, except those of texts that changed in `items`."""
        entry = next((e for e in self.folder.manifest.features if e.modality == modality), None)
        if entry is None:
            return None
        reusable = np.ones(self.folder.num_items + 1, dtype=bool)
        if modality == "text":
            new, old = items["text"].slice(0, self.folder.num_items), self.items["text"]
            equal = pc.fill_null(pc.equal(new, old), False)
            reusable[1:] = np.asarray(pc.or_(equal, pc.and_(pc.is_null(new), pc.is_null(old))))
        return ExistingFeatures(entry, self.folder.feature(modality), reusable)

    @property
    def event_types(self) -> list[str]:
        """Names of the event codes, which a grown folder keeps."""
        return list(self.folder.manifest.event_types)

    @cached_property
    def items(self) -> pa.Table:
        """Item table of the parent: item, raw, title, text, category, image, available_from."""
        items = self.folder.items
        nulls = pa.nulls(items.num_rows, pa.string())
        columns = {name: items[name] if name in items.column_names else nulls for name in _DESCRIPTIONS}
        times = self.folder.available_from[1:]
        return pa.table(
            {
                "item": np.arange(1, items.num_rows + 1),
                "raw": items["raw"],
                **columns,
                "available_from": pa.array(times, mask=times == ALWAYS),
            }
        )


def renumber_items(db: duckdb.DuckDBPyConnection, parent: Parent) -> None:
    """Renumber the table `items` (item, raw_item, raw): parent ids first, then new items in their order.

    Parent items without events get a row whose `raw_item` is NULL, which joins no event.
    """
    db.register("parent_items", parent.items)
    db.execute("CREATE TABLE known AS SELECT * FROM parent_items")
    db.unregister("parent_items")
    num_old = parent.folder.num_items
    if not fetch_value(db, "SELECT count(*) FROM known SEMI JOIN items USING (raw)"):
        raise FindRecError(
            f"none of the {num_old:,} items of {parent.folder.path} is in the events: the data are not "
            "related, or their ids are written differently now. Omit --grow to number the items anew"
        )
    db.execute(
        "CREATE TABLE renumbered AS SELECT coalesce(k.item, "
        f"{num_old} + row_number() OVER (PARTITION BY k.item IS NULL ORDER BY i.item)) AS item, "
        "raw_item, i.raw FROM items i LEFT JOIN known k ON k.raw = i.raw "
        "UNION ALL SELECT item, NULL, raw FROM known ANTI JOIN items USING (raw)"
    )
    db.execute("DROP TABLE items")
    db.execute("ALTER TABLE renumbered RENAME TO items")


def inherit_descriptions(parent: Parent, items: pa.Table) -> pa.Table:
    """Copy the parent's descriptions of items that the source no longer lists, and add the column `gone`.

    The columns `has_events` and `is_listed` (by the items SQL) are removed.
    """
    num_old = parent.folder.num_items
    num_new = items.num_rows - num_old
    has_events, is_listed = (np.asarray(items[name]) for name in ("has_events", "is_listed"))
    gone = ~has_events & ~is_listed
    columns = {n: items[n] for n in items.column_names if n not in ("has_events", "is_listed")}
    unlisted = pa.array(~is_listed)
    for name in _DESCRIPTIONS:
        old = pa.chunked_array([*parent.items[name].chunks, pa.nulls(num_new, pa.string())])
        if name in columns or old.null_count < len(old):
            columns[name] = pc.if_else(unlisted, old, columns.get(name, old))
    old = pa.chunked_array([*parent.items["available_from"].chunks, pa.nulls(num_new, pa.int64())])
    columns["available_from"] = pc.coalesce(columns.get("available_from", old), old)
    columns["gone"] = pa.array(gone)
    say(
        f"grown from {parent.folder.path}: {num_old:,} items keep their ids, {num_new:,} are new, "
        f"{int(gone.sum()):,} are gone from the source"
    )
    return pa.table(columns)


def inherited_features(parent: Parent, num_items: int, encoded: set[str]) -> list[FeatureInput]:
    """The parent's features of modalities that were not encoded again; new items have none."""
    features = []
    num_new = num_items - parent.folder.num_items
    for entry in parent.folder.manifest.features:
        if entry.modality in encoded:
            continue
        table = parent.folder.feature(entry.modality)
        values, present = scatter_features(
            num_items, np.zeros(0, np.int64), np.zeros((0, 0), np.float16), np.zeros(0, bool), base=table
        )
        features.append(
            FeatureInput(entry.modality, values, present, entry.encoder, entry.weights_sha256, entry.revision)
        )
        if num_new:
            say(f"{entry.modality}: the {num_new:,} new items have no features yet")
    return features
