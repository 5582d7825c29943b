"""The canonical event log of a recipe, made by DuckDB in a throw-away database file.

DuckDB reads, joins and sorts, on disk where memory is short. The order it fixes is final: users and items by
their raw ids, each user's events by time, ties by the recipe's rule.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import duckdb
import numpy as np
import pyarrow as pa

from findrec.datasets.fetch import Fetched
from findrec.datasets.filters import apply_filters
from findrec.datasets.formats import SourceTables, literals
from findrec.datasets.growing import Parent, renumber_items, take_over
from findrec.datasets.recipe import PLACEHOLDER, Recipe
from findrec.datasets.writer import USERS_PER_MEMBER, Block
from findrec.errors import FindRecError
from findrec.progress import progress

_NEEDED = ("user", "item", "timestamp")
_EXTRAS = ("event", "value")
_ABOUT = ("raw", "title", "text", "category")
_MORE_ABOUT = ("category", "image", "available_from")


class EventLog:
    """The tables `users`, `items` and `events` of a recipe's fetched files; `scratch` is a folder to work in.

    `length` `[U]` holds each user's events, `split` the recipe's split with its cut times, `filtered` what
    each filter left out (`findrec.datasets.filters`). With a `parent` its items and types of events keep
    their ids (`findrec.datasets.growing`). Raises `FindRecError` where the recipe's SQL fails or gives the
    wrong columns.
    """

    def __init__(
        self,
        recipe: Recipe,
        fetched: list[Fetched],
        scratch: Path,
        limit: int | None,
        parent: Parent | None = None,
    ) -> None:
        self._recipe = recipe
        self._parent = parent
        self._sql = {"events": recipe.events, "items": recipe.items}
        for one in fetched:
            self._sql = {k: getattr(one.place, k) or v for k, v in self._sql.items()}
        self._db = duckdb.connect(str(scratch / "log.duckdb"))
        self._db.execute("SET preserve_insertion_order = true")  # the row number is the order of the source
        self._db.execute(f"SET temp_directory = {literals([scratch])}")
        tables = SourceTables(self._db, scratch, recipe.name, recipe.max_bad_rows)
        self._files = {
            name: tables.add(name, one.place.files[name], paths)
            for one in fetched
            for name, paths in one.files.items()
        }
        self._read(limit)
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
            self._db.execute(sql)
        except duckdb.Error as error:
            raise self._failed(which, error) from None

    def _read(self, limit: int | None) -> None:
        recipe, db = self._recipe, self._db
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
        self.split, self.filtered = apply_filters(db, recipe, self.extras)
        db.execute(
            "CREATE TABLE users AS SELECT row_number() OVER (ORDER BY raw_user) - 1 AS u, raw_user "
            f"FROM (SELECT raw_user FROM log GROUP BY raw_user HAVING count(*) >= {recipe.min_events})"
        )
        log, users = self._value("SELECT count(*) FROM log"), self._value("SELECT count(*) FROM users")
        if not log or not users:
            raise FindRecError(self._nothing_left())
        if limit is not None:
            db.execute(f"DELETE FROM users WHERE u >= {int(limit)}")
        db.execute(
            "CREATE TABLE items AS SELECT row_number() OVER (ORDER BY raw_item) AS item, raw_item, "
            "CAST(raw_item AS VARCHAR) AS raw "
            "FROM (SELECT DISTINCT raw_item FROM log SEMI JOIN users USING (raw_user))"
        )
        if self._parent is not None:
            renumber_items(db, self._parent)
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
        # md5 and not DuckDB's own hash: the order must not change with DuckDB's version.
        tie = "row" if recipe.ties == "row" else f"md5(concat('{recipe.seed}:', row))"
        db.execute(
            f"CREATE TABLE events AS SELECT u, item, timestamp, {tie} AS tie, row {columns} "
            f"FROM log JOIN users USING (raw_user) JOIN items USING (raw_item) {join} ORDER BY u"
        )
        db.execute("DROP TABLE log")
        counted = db.execute("SELECT count(*) AS n FROM events GROUP BY u ORDER BY u").fetchnumpy()["n"]
        self.length = counted.astype(np.int64)

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

    def users(self) -> pa.Array:
        """Raw ids in user order."""
        rows = self._db.execute("SELECT CAST(raw_user AS VARCHAR) FROM users ORDER BY u").fetchall()
        return pa.array([row[0] for row in rows], pa.string())

    def event_types(self) -> list[str]:
        """Names of the codes in the `event` column; empty without one."""
        if "event" not in self.extras:
            return []
        return [row[0] for row in self._db.execute("SELECT event FROM event_types ORDER BY code").fetchall()]

    def items(self) -> pa.Table:
        """raw, title, text, category (and image, available_from where the SQL gives them) in id order; items
        that the items SQL does not know have no text. With a parent also `gone`.
        """
        about = dict.fromkeys(_ABOUT[1:], "NULL")
        described, join = "false", ""
        if self._sql["items"].strip():
            kinds = self._columns("items", ("item", "title", "text"), _MORE_ABOUT)
            about |= {name: f"a.{name}" for name in (*_ABOUT[1:], *_MORE_ABOUT) if name in kinds}
            cast = [f"CAST({name} AS VARCHAR) AS {name}" for name in kinds if name in _ABOUT]
            cast += ["CAST(image AS VARCHAR) AS image"] if "image" in kinds else []
            if (kind := kinds.get("available_from")) is not None:
                cast.append(f"{_seconds('available_from', kind)} AS available_from")
            self._run(
                "items",
                f"CREATE TABLE about AS SELECT CAST(item AS VARCHAR) AS raw, {', '.join(cast)} "
                f"FROM ({self._fill('items')})",
            )
            twice = self._db.execute(
                "SELECT raw FROM about GROUP BY raw HAVING count(*) > 1 LIMIT 3"
            ).fetchall()
            if twice:
                raise FindRecError(
                    f"recipe {self._recipe.name}: the items SQL gives some items more than once "
                    f"(e.g. {', '.join(str(row[0]) for row in twice)})"
                )
            described, join = "a.raw IS NOT NULL", "LEFT JOIN about a ON a.raw = i.raw"
        columns = {"raw": "i.raw"} | about
        if self._parent is not None:
            columns |= {"met": "i.raw_item IS NOT NULL", "described": described}
        rows = self._db.execute(
            f"SELECT {', '.join(columns.values())} FROM items i {join} ORDER BY i.item"
        ).fetchall()
        types = {"available_from": pa.int64(), "met": pa.bool_(), "described": pa.bool_()}
        items = pa.table(
            {
                name: pa.array(values, types.get(name, pa.string()))
                for name, values in zip(columns, zip(*rows, strict=True), strict=True)
            }
        )
        return items if self._parent is None else take_over(self._parent, items)

    def blocks(self) -> Iterator[Block]:
        """The events in final order, `USERS_PER_MEMBER` users at a time."""
        names = ["item", "timestamp", *self.extras]
        with progress("write shards", total=len(self.length), unit="users") as bar:
            for begin in range(0, len(self.length), USERS_PER_MEMBER):
                length = self.length[begin : begin + USERS_PER_MEMBER]
                columns = self._db.execute(
                    f"SELECT {', '.join(names)} FROM events WHERE u >= {begin} AND "
                    f"u < {begin + len(length)} ORDER BY u, timestamp, tie, row"
                ).fetchnumpy()
                yield Block({name: np.asarray(columns[name]) for name in names}, length)
                bar.advance(len(length))


def _seconds(column: str, kind: str) -> str:
    """SQL for a column of dates, times or seconds as whole seconds since 1970."""
    is_date = kind.upper().startswith(("TIMESTAMP", "DATE"))
    return f"CAST({f'epoch({column})' if is_date else column} AS BIGINT)"
