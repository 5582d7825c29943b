"""The canonical event log of a recipe, made by DuckDB in a throw-away database file.

DuckDB reads, joins and sorts, on disk where memory is short. The order it fixes is final: users and items by
their raw ids, each user's events by time, ties by the recipe's rule. Nothing here holds all events in memory;
what grows with the users is their raw ids and one number each.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import duckdb
import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from findrec.datasets.engine import Limits, Stopwatch, execute, open_database
from findrec.datasets.fetch import Fetched
from findrec.datasets.filters import apply_filters
from findrec.datasets.formats import SourceTables
from findrec.datasets.growing import Parent, renumber_items, take_over
from findrec.datasets.recipe import PLACEHOLDER, Recipe
from findrec.datasets.writer import USERS_PER_MEMBER, Block
from findrec.errors import FindRecError
from findrec.progress import progress

_NEEDED = ("user", "item", "timestamp")
_EXTRAS = ("event", "value")
_ABOUT = ("raw", "title", "text", "category")
_TIME = "available_from"
_MORE_ABOUT = ("image", _TIME)
_ROWS_AT_ONCE = 1 << 18  # events that are taken from DuckDB at a time


def _in_order(column: str) -> str:
    """Whole numbers by value, then the rest by text: the same ids have the same order whatever their SQL type
    (a CSV's numbers are read as BIGINT, those of a sequence file as text).
    """
    return f"TRY_CAST(CAST({column} AS VARCHAR) AS BIGINT), {column}"


class EventLog:
    """The tables `users`, `items` and `events` of a recipe's fetched files; `scratch` is a folder to work in.

    `length` `[U]` holds each user's events, `split` the recipe's split with its cut times, `filtered` what
    each filter left out (`findrec.datasets.filters`), `watch` the seconds that each stage took. With a
    `parent` its items and types of events keep their ids (`findrec.datasets.growing`). Raises `FindRecError`
    where the recipe's SQL fails or gives the wrong columns.
    """

    def __init__(
        self,
        recipe: Recipe,
        fetched: list[Fetched],
        scratch: Path,
        limit: int | None,
        limits: Limits,
        watch: Stopwatch,
        parent: Parent | None = None,
    ) -> None:
        self._recipe = recipe
        self._parent = parent
        self._sql = {"events": recipe.events, "items": recipe.items}
        for one in fetched:
            self._sql = {k: getattr(one.place, k) or v for k, v in self._sql.items()}
        self._db = open_database(scratch, limits)
        tables = SourceTables(self._db, scratch, recipe.name, recipe.max_bad_rows)
        with watch.stage("read"):
            self._files = {
                name: tables.add(name, one.place.files[name], paths)
                for one in fetched
                for name, paths in one.files.items()
            }
            self._read()
            self._describe()
        with watch.stage("filter"):
            self.split, self.filtered = apply_filters(self._db, recipe, self.extras)
        with watch.stage("order"):
            self._number(limit)
            self._order()
        if tables.bad_rows:
            self.filtered["bad_rows"] = tables.bad_rows

    def close(self) -> None:
        """Let go of the database file."""
        self._db.close()

    def _fill(self, which: str) -> str:
        sql = self._sql[which]
        filled = PLACEHOLDER.sub(lambda found: self._files[found[1]], sql)
        return filled.strip().rstrip(";")

    def _failed(self, which: str, error: duckdb.Error) -> FindRecError:
        told = str(error)
        if "utf-8" in told.lower():
            told += ". Give the file a `format` and its `encoding` (such as latin-1), or read_csv an encoding"
        return FindRecError(f"recipe {self._recipe.name}: the {which} SQL fails: {told}")

    def _columns(self, which: str, needed: tuple[str, ...], optional: tuple[str, ...]) -> dict[str, str]:
        """Name and SQL type of the columns that a query gives, checked."""
        try:
            described = self._db.execute(f"DESCRIBE {self._fill(which)}").fetchall()
        except duckdb.Error as error:
            raise self._failed(which, error) from None
        kinds = {row[0]: row[1] for row in described}
        names = list(kinds)
        missing = [name for name in needed if name not in names]
        unknown = [name for name in names if name not in needed + optional]
        if missing or unknown:
            hint = ""
            if any(set(name) & set(",;|\t") for name in names):
                hint = (
                    ". A malformed row can make DuckDB take a header for one name: `format: csv` (or tsv) on "
                    "the file counts and quotes such rows"
                )
            raise FindRecError(
                f"recipe {self._recipe.name}: the {which} SQL gives columns {names}; it must give "
                f"{list(needed)} and may give {list(optional)}{hint}"
            )
        return kinds

    def _value(self, sql: str) -> Any:
        row = self._db.execute(sql).fetchone()
        return row[0] if row else None

    def _run(self, which: str, sql: str) -> None:
        try:
            execute(self._db, f"read {which}", sql)
        except duckdb.OutOfMemoryException:
            raise
        except duckdb.Error as error:
            raise self._failed(which, error) from None

    def _read(self) -> None:
        """Make `log`: row (the order of the source), raw_user, raw_item, timestamp and the extras."""
        recipe = self._recipe
        kinds = self._columns("events", _NEEDED, _EXTRAS)
        self.extras = [name for name in _EXTRAS if name in kinds]
        seconds = _seconds("raw.timestamp", kinds["timestamp"])
        extras = "".join(f", raw.{name} AS {name}" for name in self.extras)
        self._run(
            "events",
            'CREATE TABLE log AS SELECT row_number() OVER () AS row, raw."user" AS raw_user, '
            f"raw.item AS raw_item, {seconds} AS timestamp {extras} "
            f"FROM ({self._fill('events')}) AS raw",
        )
        empty = self._value(
            "SELECT count(*) FROM log WHERE raw_user IS NULL OR raw_item IS NULL OR timestamp IS NULL"
        )
        if empty:
            raise FindRecError(
                f"recipe {recipe.name}: {empty:,} events have no user, item or timestamp; "
                "leave them out in the events SQL"
            )

    def _describe(self) -> None:
        """Make `about` of the items SQL, where there is one: raw and what else it gives."""
        self._about: list[str] = []
        if not self._sql["items"].strip():
            return
        kinds = self._columns("items", ("item", "title", "text"), ("category", *_MORE_ABOUT))
        self._about = [name for name in (*_ABOUT[1:], *_MORE_ABOUT) if name in kinds]
        cast = [f"CAST({name} AS VARCHAR) AS {name}" for name in self._about if name != _TIME]
        if _TIME in kinds:
            cast.append(f"{_seconds(_TIME, kinds[_TIME])} AS {_TIME}")
        self._run(
            "items",
            f"CREATE TABLE about AS SELECT CAST(item AS VARCHAR) AS raw, {', '.join(cast)} "
            f"FROM ({self._fill('items')})",
        )
        twice = self._db.execute("SELECT raw FROM about GROUP BY raw HAVING count(*) > 1 LIMIT 3").fetchall()
        if twice:
            raise FindRecError(
                f"recipe {self._recipe.name}: the items SQL gives some items more than once "
                f"(e.g. {', '.join(str(row[0]) for row in twice)})"
            )

    def _number(self, limit: int | None) -> None:
        """Make `users` (u from 0 on, raw_user, n events) and `items` (item from 1 on, raw_item, raw); items
        that no event names are without raw_item.
        """
        db = self._db
        execute(
            db,
            "number users",
            f"CREATE TABLE users AS SELECT row_number() OVER (ORDER BY {_in_order('raw_user')}) - 1 AS u, "
            "raw_user, n FROM (SELECT raw_user, count(*) AS n FROM log GROUP BY raw_user "
            f"HAVING count(*) >= {self._recipe.min_events})",
        )
        log, users = self._value("SELECT count(*) FROM log"), self._value("SELECT count(*) FROM users")
        if not log or not users:
            raise FindRecError(self._nothing_left())
        if limit is not None:
            db.execute(f"DELETE FROM users WHERE u >= {int(limit)}")
        execute(
            db,
            "number items",
            f"CREATE TABLE items AS SELECT row_number() OVER (ORDER BY {_in_order('raw_item')}) AS item, "
            "raw_item, CAST(raw_item AS VARCHAR) AS raw "
            "FROM (SELECT DISTINCT raw_item FROM log SEMI JOIN users USING (raw_user))",
        )
        if self._recipe.unmet_items == "keep" and self._about:
            db.execute(
                f"INSERT INTO items SELECT (SELECT count(*) FROM items) + row_number() OVER "
                f"(ORDER BY {_in_order('raw')}), NULL, raw FROM about ANTI JOIN items USING (raw)"
            )
        if self._parent is not None:
            renumber_items(db, self._parent)
        counted = db.execute("SELECT n FROM users ORDER BY u").fetchnumpy()["n"]
        self.length = counted.astype(np.int64)

    def _order(self) -> None:
        """Make `events` of `log`: item, timestamp and the extras, in the final order."""
        recipe, db = self._recipe, self._db
        columns, join = "", ""
        if "event" in self.extras:
            old = [] if self._parent is None else self._parent.event_types
            db.execute(
                "CREATE TABLE event_types AS SELECT row_number() OVER "
                "(ORDER BY list_position($old, event) NULLS LAST, event) - 1 AS code, event "
                "FROM (SELECT CAST(event AS VARCHAR) AS event FROM log WHERE event IS NOT NULL "
                "UNION SELECT unnest($old))",
                {"old": old},
            )
            columns += ", coalesce(e.code, -1) AS event"
            join = "LEFT JOIN event_types e ON e.event = CAST(log.event AS VARCHAR)"
        if "value" in self.extras:
            columns += ", coalesce(CAST(value AS FLOAT), CAST('nan' AS FLOAT)) AS value"
        tie = ""
        if recipe.ties == "shuffle":
            # md5 and not DuckDB's own hash: the order must not change with DuckDB's version. Its first 64
            # bits as a number sort as its text does, in half the memory and less.
            tie = f"CAST('0x' || left(md5(concat('{recipe.seed}:', row)), 16) AS UBIGINT), "
        execute(
            db,
            "order events",
            f"CREATE TABLE events AS SELECT item, timestamp {columns} "
            f"FROM log JOIN users USING (raw_user) JOIN items USING (raw_item) {join} "
            f"ORDER BY u, timestamp, {tie} row",
        )
        db.execute("DROP TABLE log")

    def _nothing_left(self) -> str:
        """The message where the filters leave no event."""
        recipe, counts = self._recipe, self.filtered
        if not counts["read"]:
            return (
                f"recipe {recipe.name}: the events SQL gives no rows: check its WHERE and the source's files"
            )
        told = [f"{count:,} left out by {name}" for name, count in counts.items() if name != "read"]
        told.append(f"no user has min_events={recipe.min_events} events or more among the rest")
        return (
            f"recipe {recipe.name}: no events are left of {counts['read']:,} read ({', '.join(told)}): "
            "lower the recipe's "
            + ", ".join([n for n in counts if n in ("min_value", "k_core")] + ["min_events"])
        )

    def users(self) -> pa.ChunkedArray:
        """Raw ids in user order."""
        found = self._db.sql("SELECT CAST(raw_user AS VARCHAR) AS raw FROM users ORDER BY u")
        return found.to_arrow_table()["raw"].cast(pa.string())

    def event_types(self) -> list[str]:
        """Names of the codes in the `event` column; empty without one."""
        if "event" not in self.extras:
            return []
        return [row[0] for row in self._db.execute("SELECT event FROM event_types ORDER BY code").fetchall()]

    def items(self) -> pa.Table:
        """raw, title, text, category (and image, available_from where the SQL gives them) in id order; items
        that the items SQL does not know have no text. With a parent also `gone`.
        """
        described, join = "false", ""
        if self._about:
            described, join = "a.raw IS NOT NULL", "LEFT JOIN about a ON a.raw = i.raw"
        about = {name: f"a.{name}" if name in self._about else "NULL" for name in _ABOUT[1:]}
        about |= {name: f"a.{name}" for name in _MORE_ABOUT if name in self._about}
        columns = {"raw": "i.raw"} | about
        if self._parent is not None:
            columns |= {"met": "i.raw_item IS NOT NULL", "described": described}
        selected = ", ".join(f"{sql} AS {name}" for name, sql in columns.items())
        found = self._db.sql(f"SELECT {selected} FROM items i {join} ORDER BY i.item").to_arrow_table()
        types = {_TIME: pa.int64(), "met": pa.bool_(), "described": pa.bool_()}
        items = found.cast(pa.schema([(name, types.get(name, pa.string())) for name in columns]))
        return items if self._parent is None else take_over(self._parent, items)

    def blocks(self) -> Iterator[Block]:
        """The events in final order, `USERS_PER_MEMBER` users at a time."""
        names = ["item", "timestamp", *self.extras]
        reader = self._db.sql(f"SELECT {', '.join(names)} FROM events").to_arrow_reader(_ROWS_AT_ONCE)
        waiting = {name: np.empty(0) for name in names}
        with progress("write shards", total=len(self.length), unit="users") as bar:
            for begin in range(0, len(self.length), USERS_PER_MEMBER):
                length = self.length[begin : begin + USERS_PER_MEMBER]
                wanted = int(length.sum())
                if len(waiting["item"]) < wanted:
                    waiting = _further(reader, waiting, wanted)
                yield Block({name: values[:wanted] for name, values in waiting.items()}, length)
                waiting = {name: values[wanted:] for name, values in waiting.items()}
                bar.advance(len(length))


def _further(
    reader: pa.RecordBatchReader, waiting: dict[str, NDArray[Any]], wanted: int
) -> dict[str, NDArray[Any]]:
    """The columns that are waiting and so many batches that `wanted` rows are there."""
    parts = {name: [values] if len(values) else [] for name, values in waiting.items()}
    have = len(waiting["item"])
    while have < wanted:
        batch = reader.read_next_batch()
        for name, column in parts.items():
            column.append(batch.column(name).to_numpy(zero_copy_only=False))
        have += batch.num_rows
    return {name: np.concatenate(column) for name, column in parts.items()}


def _seconds(column: str, kind: str) -> str:
    """SQL for a column of dates, times or seconds as whole seconds since 1970."""
    is_date = kind.upper().startswith(("TIMESTAMP", "DATE"))
    return f"CAST({f'epoch({column})' if is_date else column} AS BIGINT)"
