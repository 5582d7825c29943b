"""Allow-lists: the items that meet given conditions, e.g. those of a category, or those in stock.

A condition is `column=value` (a column of `items.parquet`; of a cell that lists several values, as
"Comedy, Drama" does, each counts) or `file:PATH` (raw item ids: a text file with one a line, a CSV, TSV or
Parquet file with a column `item`). An item is allowed when it meets one of the conditions on each column
named, and is in one of the files where there are any.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
from numpy.typing import NDArray

from findrec.datasets.folder import DataFolder
from findrec.datasets.ready_vectors import read_ids
from findrec.errors import FindRecError, suggest
from findrec.paths import resolve
from findrec.progress import say

FILE = "file:"
_BETWEEN_VALUES = r"\s*[,|;]\s*"  # of a cell
Bools = NDArray[np.bool_]


def allowed_items(folder: DataFolder, conditions: Sequence[str]) -> Bools:
    """`[V + 1]` which items meet the conditions; False for padding.

    Raises `FindRecError` for what is no condition, an unknown column, a value that no item has, a file that
    cannot be read or names no item of the data, and conditions that no item meets together.
    """
    either: dict[str, Bools] = defaultdict(lambda: np.zeros(folder.num_items + 1, dtype=bool))
    for condition in conditions:
        column, equals, value = condition.partition("=")
        if condition.startswith(FILE):
            either[FILE] |= _in_file(folder, condition.removeprefix(FILE))
        elif column and equals:
            either[column] |= _with_value(folder, column, value)
        else:
            raise FindRecError(
                f"{condition!r} is no condition for items: write column=value (e.g. category=Comedy) or "
                f"{FILE}PATH, a file of raw item ids"
            )
    met = np.logical_and.reduce(list(either.values()))
    if not met.any():
        raise FindRecError(f"no item of {folder.path} meets {' and '.join(conditions)} at once")
    return np.asarray(met)


def _with_value(folder: DataFolder, name: str, value: str) -> Bools:
    cells = folder.item_column(name)
    if cells is None:
        known = [column for column in pq.read_schema(folder.path / "items.parquet").names if column != "item"]
        raise FindRecError(
            f"{name}={value}: {folder.path / 'items.parquet'} has no column {name!r}{suggest(name, known)} "
            f"(there: {', '.join(known)})"
        )
    if pa.types.is_list(cells.type) or pa.types.is_large_list(cells.type):
        parts = [[str(one) for one in cell or ()] for cell in cells.to_pylist()]
        each, row = [one for cell in parts for one in cell], np.repeat(range(len(parts)), [*map(len, parts)])
        values = pa.chunked_array([pa.array(each, pa.string())])
    else:
        text = pc.cast(cells, pa.string())
        split = pc.split_pattern_regex(text, _BETWEEN_VALUES)
        values = pa.chunked_array([pc.list_flatten(split).combine_chunks(), text.combine_chunks()])
        inside = pc.list_parent_indices(split.combine_chunks()).to_numpy(zero_copy_only=False)
        row = np.concatenate([inside, np.arange(len(text))])  # the whole cell is a value, too
    same = pc.fill_null(pc.equal(values, value), False).to_numpy(zero_copy_only=False).astype(bool)
    met = np.zeros(folder.num_items + 1, dtype=bool)
    met[row[same].astype(np.int64) + 1] = True
    if not met.any():
        known = [one for one in pc.unique(values).to_pylist() if one]
        raise FindRecError(f"{name}={value}: no item of {folder.path} has that value{suggest(value, known)}")
    return met


def _in_file(folder: DataFolder, path: str) -> Bools:
    file = resolve(path)
    ids = [one.strip() for one in read_ids(file)]
    ids = [one for one in ids if one]
    raw = folder.item_column("raw")
    assert raw is not None, "every data folder keeps the raw ids"
    given = pa.array(ids, pa.string())
    met = pc.is_in(pc.cast(raw, pa.string()), value_set=given).to_numpy(zero_copy_only=False)
    if not met.any():
        raise FindRecError(
            f"{file}: none of its {len(ids):,} ids is a raw item id of {folder.path} "
            f"(an id there: {raw[0].as_py()!r}{', one here: ' + repr(ids[0]) if ids else ''})"
        )
    if strange := len(set(ids)) - int(met.sum()):
        say(f"{file}: {strange:,} of {len(set(ids)):,} ids are of no item of the data and are left out")
    return np.concatenate([[False], met]).astype(bool)
