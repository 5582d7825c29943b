"""Growing a catalogue: the items of an earlier data folder keep their ids, new ones are numbered after them.

A model's table rows are found by item id, so a model trained on the earlier folder stays true on the grown
one, and a run can start from it (`findrec.training.warm_start`). An item that is in neither the events nor
the items of the new source keeps its id, row and features and is marked `gone`: it is never a candidate,
until it comes back. Types of events keep their codes likewise. Users are numbered anew: nothing is learnt
about a user row, and one without events would have no history to pack.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import duckdb
import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray

from findrec.datasets.features import FeatureInput
from findrec.datasets.folder import ALWAYS, DataFolder
from findrec.datasets.make_features import Before
from findrec.datasets.manifest import MANIFEST_NAME, FeatureEntry, ParentEntry, sha256_file
from findrec.datasets.recipe import ReadyFeature, Recipe, TextFeature
from findrec.errors import FindRecError
from findrec.progress import say

_TAKEN_OVER = ("title", "text", "category", "image")  # of items that the source no longer describes


@dataclass(frozen=True)
class Parent:
    """An earlier data folder of the same recipe, verified, that a new one grows out of."""

    folder: DataFolder
    entry: ParentEntry  # for the grown folder's manifest

    @staticmethod
    def open(path: Path, recipe: Recipe) -> Parent:
        """Open and verify the folder; `FindRecError` where `recipe` cannot continue its ids and features."""
        folder = DataFolder.open(path, verify=True)
        manifest = folder.manifest
        anew = "Leave --grow out to number the items anew"
        if manifest.recipe != recipe.name:
            raise FindRecError(
                f"{path} was made from the recipe {manifest.recipe!r}: {recipe.name!r} cannot continue its "
                f"item ids. Give a data folder of {recipe.name!r} to grow. {anew}"
            )
        raw = folder.items["raw"].combine_chunks()
        if len(raw) != manifest.num_items or raw.null_count or len(pc.unique(raw)) != len(raw):
            raise FindRecError(
                f"{path / 'items.parquet'} is no list of {manifest.num_items:,} distinct items: its id map "
                f"is damaged. Give another folder to grow. {anew}"
            )
        have = {entry.modality: entry.encoder for entry in manifest.features}
        for modality, spec in recipe.features.wanted().items():
            if isinstance(spec, ReadyFeature) or have.get(modality) == spec.encoder:
                continue
            if modality in have or isinstance(spec, TextFeature) or not spec.optional:
                found = f"those of {have[modality]!r}" if modality in have else f"no {modality} features"
                raise FindRecError(
                    f"{path} has {found}, the recipe {recipe.name!r} asks for {modality} features of "
                    f"{spec.encoder!r}: old and new items would not be comparable. Set features.{modality} "
                    f"of the recipe to what the folder has. {anew}"
                )
        digest = sha256_file(path / MANIFEST_NAME)
        return Parent(folder, ParentEntry(manifest_sha256=digest, num_items=manifest.num_items))

    def before(self, modality: str, items: pa.Table) -> Before | None:
        """The rows of a modality that the grown folder's `items` keep: those of old items, but of text only
        where it is what it was. None where the folder has no such modality.
        """
        entry = next((e for e in self.folder.manifest.features if e.modality == modality), None)
        if entry is None:
            return None
        kept = np.ones(self.folder.num_items + 1, dtype=bool)
        if modality == "text":
            now, then = items["text"].slice(0, self.folder.num_items), self.known["text"]
            equal = pc.fill_null(pc.equal(now, then), False)
            kept[1:] = np.asarray(pc.or_(equal, pc.and_(pc.is_null(now), pc.is_null(then))))
        return Before(entry, self.folder.feature(modality), kept)

    @property
    def event_types(self) -> list[str]:
        """Names of the event codes, which a grown folder keeps."""
        return list(self.folder.manifest.event_types)

    @cached_property
    def known(self) -> pa.Table:
        """item, raw, title, text, category, image, available_from: what is known of each item."""
        items = self.folder.items
        nothing = pa.nulls(items.num_rows, pa.string())
        columns = {name: items[name] if name in items.column_names else nothing for name in _TAKEN_OVER}
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
    """Give the table `items` (item, raw_item, raw) the parent's ids, new items the ids after them, in their
    order so far. Items that no event names any more get a row without `raw_item`, which joins no event.
    """
    db.register("parent_items", parent.known)
    db.execute("CREATE TABLE known AS SELECT * FROM parent_items")
    db.unregister("parent_items")
    old = parent.folder.num_items
    met = db.execute("SELECT count(*) FROM known SEMI JOIN items USING (raw)").fetchone()
    if met is None or not met[0]:
        raise FindRecError(
            f"none of the {old:,} items of {parent.folder.path} is in the events: either this is other "
            "data, or its ids are written differently now. Leave --grow out to number the items anew"
        )
    db.execute(
        "CREATE TABLE renumbered AS SELECT coalesce(k.item, "
        f"{old} + row_number() OVER (PARTITION BY k.item IS NULL ORDER BY i.item)) AS item, raw_item, i.raw "
        "FROM items i LEFT JOIN known k ON k.raw = i.raw "
        "UNION ALL SELECT item, NULL, raw FROM known ANTI JOIN items USING (raw)"
    )
    db.execute("DROP TABLE items")
    db.execute("ALTER TABLE renumbered RENAME TO items")


def take_over(parent: Parent, items: pa.Table) -> pa.Table:
    """Fill in what the parent knows of items that the source no longer describes, and mark those `gone`.

    `items` are the rows of all items in id order, with the columns `met` (has events) and `described` (the
    items SQL names it), which are replaced by `gone`.
    """
    old, known = parent.folder.num_items, parent.known
    more = items.num_rows - old
    met, described = (np.asarray(items[name]) for name in ("met", "described"))
    gone = ~met & ~described
    columns = {name: items[name] for name in items.column_names if name not in ("met", "described")}
    silent = pa.array(~described)
    for name in _TAKEN_OVER:
        before = pa.chunked_array([*known[name].chunks, pa.nulls(more, pa.string())])
        if name not in columns and before.null_count == len(before):
            continue
        columns[name] = pc.if_else(silent, before, columns.get(name, before))
    before = pa.chunked_array([*known["available_from"].chunks, pa.nulls(more, pa.int64())])
    columns["available_from"] = pc.coalesce(columns.get("available_from", before), before)
    columns["gone"] = pa.array(gone)
    say(
        f"grown from {parent.folder.path}: {old:,} items keep their ids, {more:,} are new, "
        f"{int(gone.sum()):,} are gone from the source"
    )
    return pa.table(columns)


def carried_over(parent: Parent, num_items: int, made: set[str]) -> list[FeatureInput]:
    """The parent's features of other modalities than `made`; new items are without them."""
    features = []
    for entry in parent.folder.manifest.features:
        if entry.modality not in made:
            same = np.arange(num_items) < parent.folder.num_items
            features.append(_rows_of_parent(parent, entry, num_items, same))
            if num_items > len(parent.known):
                say(f"{entry.modality}: the {num_items - len(parent.known):,} new items have no features yet")
    return features


def _rows_of_parent(
    parent: Parent, entry: FeatureEntry, num_items: int, same_V: NDArray[np.bool_]
) -> FeatureInput:
    """A table for `num_items` items with the parent's rows where `same_V` `[V]`, empty elsewhere."""
    table = parent.folder.feature(entry.modality)
    values = np.zeros((num_items + 1, table.dim), dtype=np.float16)
    present = np.zeros(num_items + 1, dtype=bool)
    ids = 1 + np.flatnonzero(same_V)
    values[ids], present[ids] = table.values[ids], table.present[ids]
    return FeatureInput(entry.modality, values, present, entry.encoder, entry.weights_sha256)
