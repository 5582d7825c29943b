"""Tables of pandas, polars or pyarrow as the source of a data set, instead of files."""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from findrec.datasets.sources.recipe import Recipe, parse_recipe
from findrec.errors import FindRecError, suggest
from findrec.files import replacing
from findrec.paths import resolve

_EVENTS = ("user", "item", "timestamp", "event", "value")
_IDS = ("user", "item")
_ENCODER = "all-MiniLM-L6-v2"


def is_table(given: object) -> bool:
    """Whether `given` is a table of pandas, polars or pyarrow."""
    return isinstance(given, pa.Table) or (hasattr(given, "columns") and hasattr(given, "__arrow_c_stream__"))


def to_arrow(table: object, what: str) -> pa.Table:
    """A table of pandas, polars or pyarrow as a pyarrow table; `FindRecError` for other objects."""
    if isinstance(table, pa.Table):
        return table
    try:
        converted = pa.table(table)
    except (TypeError, ValueError, pa.ArrowException) as error:
        raise FindRecError(
            f"{what}: expected a table of pandas, polars or pyarrow, not {type(table).__name__} ({error})"
        ) from None
    index = [name for name in converted.column_names if name.startswith("__index_level_")]
    return converted.drop_columns(index)


def table_recipe(name: str, events: object, items: object = None, **keys: Any) -> Recipe:
    """A recipe that reads tables, which are written to `data/<name>-source/` in FindRec's home.

    Args:
        name: name of the data set.
        events: table with the columns user, item, timestamp (seconds, or times) and optionally event, value.
        items: table with the columns item and optionally title, text, category, image, available_from, and
            others. If it has texts they are encoded, unless `features` are given.
        keys: other keys of a recipe, such as `split`, `ties` or `features`.

    Raises:
        FindRecError: for missing columns, ids that are not text or whole numbers, or invalid keys.
    """
    folder = resolve("data") / f"{name}-source"
    given = {"events": _columns(to_arrow(events, "events"), "events", ("user", "item", "timestamp"))}
    unknown = [column for column in given["events"].column_names if column not in _EVENTS]
    given["events"] = given["events"].drop_columns(unknown)
    if items is not None:
        given["items"] = _columns(to_arrow(items, "items"), "items", ("item",))
    files = {
        kind: {"member": _write(folder, kind, table), "format": "parquet"} for kind, table in given.items()
    }
    tree: dict[str, Any] = {
        "name": name,
        "title": name,
        "licence": "that of the tables",
        "source": "tables passed to findrec.prepare",
        "sources": {"tables": [{"path": str(folder), "files": files}]},
        "events": f"SELECT {_selected(given['events'])} FROM {{events}}",
    }
    if items is not None:
        tree["items"] = f"SELECT {_selected_items(given['items'])} FROM {{items}}"
        if "text" in given["items"].column_names:
            tree["features"] = {"text": {"encoder": _ENCODER}}
    return parse_recipe({**tree, **keys}, f"findrec.prepare({name!r})", folder)


def _selected(table: pa.Table) -> str:
    return ", ".join('"{}"'.format(name.replace('"', '""')) for name in table.column_names)


def _selected_items(table: pa.Table) -> str:
    """The columns of the items, with those that a recipe must select."""
    title = "" if "title" in table.column_names else ", item AS title"
    text = "" if "text" in table.column_names else ", NULL::VARCHAR AS text"
    return f"{_selected(table)}{title}{text}"


def _write(folder: Path, kind: str, table: pa.Table) -> str:
    """Write a table to a file that is named by its contents, so that another table is another source."""
    sink = pa.BufferOutputStream()
    pq.write_table(table, sink)
    content = sink.getvalue().to_pybytes()
    path = folder / f"{kind}-{hashlib.sha256(content).hexdigest()[:16]}.parquet"
    if not path.is_file():
        try:
            folder.mkdir(parents=True, exist_ok=True)
            with replacing(path) as part:
                part.write_bytes(content)
        except OSError as error:
            raise FindRecError(f"cannot write {path}: {error.strerror or error}") from None
    return path.name


def _columns(table: pa.Table, what: str, needed: tuple[str, ...]) -> pa.Table:
    """The table with ids as text and times in seconds, without the type information of pandas."""
    for name in needed:
        if name not in table.column_names:
            raise FindRecError(
                f"{what}: no column {name!r}{suggest(name, table.column_names)} (columns: "
                f"{', '.join(table.column_names)}). Rename yours, e.g. table.rename(columns=...)"
            )
    for name in table.column_names:
        column, number = table[name], table.column_names.index(name)
        if name in _IDS:
            table = table.set_column(number, name, _as_text(column, what, name))
        elif name in ("timestamp", "available_from"):
            table = table.set_column(number, name, _as_seconds(column, what, name))
    return table.replace_schema_metadata(None)


def _as_text(column: pa.ChunkedArray, what: str, name: str) -> pa.ChunkedArray:
    kind = column.type.value_type if pa.types.is_dictionary(column.type) else column.type
    if pa.types.is_floating(kind):
        raise FindRecError(
            f"{what}: column {name!r} has floating-point numbers, which are no ids. If whole numbers "
            "became 7.0 because some are missing: drop those rows, then .astype('int64')"
        )
    try:
        return column.cast(pa.string())
    except pa.ArrowException as error:
        raise FindRecError(f"{what}: column {name!r} of type {column.type} holds no ids ({error})") from None


def _as_seconds(column: pa.ChunkedArray, what: str, name: str) -> pa.ChunkedArray:
    try:
        if pa.types.is_timestamp(column.type) or pa.types.is_date(column.type):
            column = pc.floor_temporal(
                column.cast(pa.timestamp("us", getattr(column.type, "tz", None))), unit="second"
            )
            return column.cast(pa.timestamp("s", getattr(column.type, "tz", None))).cast(pa.int64())
        return column.cast(pa.int64())
    except pa.ArrowException as error:
        raise FindRecError(
            f"{what}: column {name!r} of type {column.type} has no times ({error}). Give seconds since 1970 "
            "or times, e.g. pandas.to_datetime(...)"
        ) from None
