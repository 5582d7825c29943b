"""Allow-lists: the items that satisfy conditions, such as a category, a price or a list of items in stock.

A condition is one of

* `column=value`, for a column of `items.parquet`; every value of a cell such as "Comedy, Drama" counts.
  Several such conditions on one column are alternatives;
* `column<value` (or `<=`, `>`, `>=`, `!=`). An item without a value satisfies `!=` only;
* `file:PATH` or `file:PATH#COLUMN` with raw item ids: a text file with one id per line, or a CSV, TSV or
  Parquet file with the ids in `COLUMN` (default: `item`, or the only column).

Numbers are compared as numbers and `true` and `false` as booleans, in text columns too if all of their values
are numbers or booleans; other text is compared as text. An item is allowed if it satisfies the conditions on
every column, and if it is in one of the files, if any.
"""

from __future__ import annotations

import operator
import re
from collections import defaultdict
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray

from findrec.config import CONDITION
from findrec.datasets.encoders.ready_vectors import read_ids
from findrec.datasets.folder.data_folder import DataFolder
from findrec.datasets.folder.tables import ITEMS_FILE, column_names
from findrec.errors import FindRecError, suggest
from findrec.paths import resolve
from findrec.progress import warn

FILE = "file:"
_SEPARATOR = r"\s*[,|;]\s*"  # of the values of a cell
_BOOLEANS = {"true": True, "false": False}
_IDS = ("raw", "title", "text")  # always text, even if all values are numbers
_COMPARE: dict[str, Callable[[Any, Any], Any]] = {
    "<": operator.lt,
    "<=": operator.le,
    ">": operator.gt,
    ">=": operator.ge,
}
_NUMERIC = (pa.types.is_boolean, pa.types.is_integer, pa.types.is_floating, pa.types.is_decimal)
Bools = NDArray[np.bool_]


def allowed_items(folder: DataFolder, conditions: Sequence[str]) -> Bools:
    """Which items `[V + 1]` satisfy the conditions; False for padding.

    Raises `FindRecError` for a malformed condition, an unknown column, a value that no item has, a file that
    cannot be read or contains no item of the data, and conditions that no item satisfies together.
    """
    any_of: dict[str, Bools] = defaultdict(lambda: np.zeros(folder.num_items, dtype=bool))
    all_of: list[Bools] = []
    for condition in conditions:
        match = re.fullmatch(CONDITION, condition)
        if condition.startswith(FILE):
            any_of[FILE] |= _in_file(folder, condition.removeprefix(FILE))
        elif match is None:
            raise FindRecError(
                f"{condition!r} is not a condition for items: write column=value (e.g. category=Comedy), "
                f"'price<20' (in quotes, because of the shell) or {FILE}PATH, a file of raw item ids"
            )
        elif match["operator"] == "=":
            any_of[match["column"]] |= _equal(folder, match["column"], match["value"])
        else:
            all_of.append(_compared(folder, match["column"], match["operator"], match["value"]))
    allowed = np.logical_and.reduce([*any_of.values(), *all_of])
    if not allowed.any():
        raise FindRecError(f"no item of {folder.path} satisfies {' and '.join(conditions)} at once")
    return np.concatenate([[False], allowed])


def _column(folder: DataFolder, name: str) -> pa.ChunkedArray:
    cells = folder.item_column(name)
    if cells is None:
        names = column_names(folder.path, ITEMS_FILE, folder.manifest)
        known = [column for column in names if column != "item"]
        raise FindRecError(
            f"{folder.path / ITEMS_FILE} has no column {name!r}{suggest(name, known)} "
            f"(available: {', '.join(known)})"
        )
    return cells


def _plain_values(name: str, cells: pa.ChunkedArray) -> NDArray[Any] | None:
    """Numbers as float64 (NaN where missing), or booleans as 1.0 and 0.0; None for columns of text."""
    if any(test(cells.type) for test in _NUMERIC):
        return _floats(cells)
    if name in _IDS or not (pa.types.is_string(cells.type) or pa.types.is_large_string(cells.type)):
        return None
    text = pc.utf8_lower(pc.utf8_trim_whitespace(cells))
    text = pc.if_else(pc.equal(text, ""), None, text)
    is_boolean = pc.all(pc.is_in(text, value_set=pa.array([*_BOOLEANS, None]))).as_py()
    try:
        return _floats(pc.cast(text, pa.bool_() if is_boolean else pa.float64()))
    except pa.ArrowInvalid:
        return None


def _floats(cells: pa.ChunkedArray) -> NDArray[Any]:
    return np.asarray(pc.fill_null(pc.cast(cells, pa.float64(), safe=False), np.nan), dtype=np.float64)


def _as_number(value: str, values_V: NDArray[Any]) -> float | None:
    """The value as a number, or as 1 or 0 for `true` or `false` if the column has no other numbers."""
    if value.lower() in _BOOLEANS and np.isin(values_V[~np.isnan(values_V)], (0.0, 1.0)).all():
        return float(_BOOLEANS[value.lower()])
    try:
        return float(value)
    except ValueError:
        return None


def _describe(values_V: NDArray[Any]) -> str:
    known_N = values_V[~np.isnan(values_V)]
    return f"its values are from {known_N.min():g} to {known_N.max():g}" if len(known_N) else "it is empty"


def _equal(folder: DataFolder, name: str, value: str) -> Bools:
    mask, known = _matches(folder, name, value)
    if not mask.any():
        hint = known if isinstance(known, str) else suggest(value, known)
        raise FindRecError(f"{name}={value}: no item of {folder.path} has that value{hint}")
    return mask


def _matches(folder: DataFolder, name: str, value: str) -> tuple[Bools, list[str] | str]:
    """Which items have the value, and the known values or a description of them."""
    cells = _column(folder, name)
    numbers_V = _plain_values(name, cells)
    if numbers_V is not None and (number := _as_number(value, numbers_V)) is not None:
        return np.asarray(numbers_V == number), f" ({_describe(numbers_V)})"
    if pa.types.is_list(cells.type) or pa.types.is_large_list(cells.type):
        parts = [[str(one) for one in cell or ()] for cell in cells.to_pylist()]
        row = np.repeat(range(len(parts)), [len(cell) for cell in parts])
        values = pa.chunked_array([pa.array([one for cell in parts for one in cell], pa.string())])
    else:
        text = pc.cast(cells, pa.string())
        split = pc.split_pattern_regex(text, _SEPARATOR)
        values = pa.chunked_array([pc.list_flatten(split).combine_chunks(), text.combine_chunks()])
        inside = pc.list_parent_indices(split.combine_chunks()).to_numpy(zero_copy_only=False)
        row = np.concatenate([inside, np.arange(len(text))])  # the whole cell is a value too
    same = pc.fill_null(pc.equal(values, value), False).to_numpy(zero_copy_only=False).astype(bool)
    mask = np.zeros(folder.num_items, dtype=bool)
    mask[row[same].astype(np.int64)] = True
    return mask, [one for one in pc.unique(values).to_pylist() if one]


def _compared(folder: DataFolder, name: str, comparison: str, value: str) -> Bools:
    if comparison == "!=":
        return ~_matches(folder, name, value)[0]
    cells = _column(folder, name)
    numbers_V = _plain_values(name, cells)
    if numbers_V is not None:
        if (number := _as_number(value, numbers_V)) is None:
            raise FindRecError(
                f"{name}{comparison}{value}: the column {name!r} of {folder.path / ITEMS_FILE} has "
                f"numbers, and {value!r} is none ({_describe(numbers_V)})"
            )
        mask, known = np.asarray(_COMPARE[comparison](numbers_V, number)), f" ({_describe(numbers_V)})"
    else:
        try:
            text = pc.cast(cells, pa.string()).to_pylist()
        except pa.ArrowException:
            raise FindRecError(f"{name}{comparison}{value}: {name!r} is a list; use {name}=value") from None
        mask, known = np.array([one is not None and _COMPARE[comparison](one, value) for one in text]), ""
    if not mask.any():
        raise FindRecError(f"{name}{comparison}{value}: no item of {folder.path} satisfies it{known}")
    return mask


def _in_file(folder: DataFolder, path: str) -> Bools:
    file, column = resolve(path), None
    if not file.is_file() and "#" in path:
        before, _, column = path.rpartition("#")
        file = resolve(before)
    ids = [stripped for one in read_ids(file, column, report=True) if (stripped := one.strip())]
    raw = folder.item_column("raw")
    assert raw is not None, "every data folder keeps the raw ids"
    listed = pc.is_in(pc.cast(raw, pa.string()), value_set=pa.array(ids, pa.string()))
    mask = np.asarray(listed.to_numpy(zero_copy_only=False), dtype=bool)
    if not mask.any():
        raise FindRecError(
            f"{file}: none of its {len(ids):,} ids is a raw item id of {folder.path} "
            f"(an id of the data: {raw[0].as_py()!r}{', of the file: ' + repr(ids[0]) if ids else ''})"
        )
    if unknown := len(set(ids)) - int(mask.sum()):
        warn(f"{file}: {unknown:,} of {len(set(ids)):,} ids are not in the data and are ignored")
    return mask
