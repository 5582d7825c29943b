"""Build the canonical event log of a recipe with DuckDB, in a temporary database file.

DuckDB reads, joins and sorts, on disk if memory is short. The resulting order is final: users and items by
raw id, each user's events by time, ties by the recipe's rule. Events are never all in memory; what grows with
the users is their raw ids and one number each.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import duckdb
import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from findrec.datasets.folder.writer import USERS_PER_MEMBER, Block
from findrec.datasets.prepare.growing import Parent, inherit_descriptions, renumber_items
from findrec.datasets.sources import times
from findrec.datasets.sources.duckdb_engine import (
    ARROW_TYPES,
    SQL_ERRORS,
    Limits,
    Stopwatch,
    describe,
    execute,
    fetch_value,
    identifier,
    open_database,
    plain_type,
)
from findrec.datasets.sources.fetch import Fetched
from findrec.datasets.sources.filters import apply_filters
from findrec.datasets.sources.formats import SourceTables
from findrec.datasets.sources.recipe import Recipe
from findrec.datasets.sources.text_columns import check_id_types, text_columns
from findrec.errors import FindRecError
from findrec.progress import progress, say

_REQUIRED = ("user", "item", "timestamp")
_EXTRAS = ("event", "value")
_DESCRIPTIONS = ("title", "text", "category")
_TIME = "available_from"
_OPTIONAL_DESCRIPTIONS = ("image", _TIME)
_RESERVED = ("raw", "gone", "train_count", "has_events", "is_listed")  # columns of our own
_ROWS_AT_ONCE = 1 << 18  # events fetched from DuckDB at a time


def _sort_key(column: str) -> str:
    """SQL sort key of ids: integers by value, then the rest as text, whatever the SQL type of the column."""
    return f"TRY_CAST(CAST({column} AS VARCHAR) AS BIGINT), {column}"


class EventLog:
    """The database tables `users`, `items` and `events` of a recipe.

    Attributes:
        length: `[U]` number of events of each user.
        split: The recipe's split with its cut times.
        filtered: Number of events read and removed by each filter (`findrec.datasets.sources.filters`).
    """

    def __init__(
        self,
        recipe: Recipe,
        fetched: list[Fetched],
        scratch: Path,
        limit: int | None,
        limits: Limits,
        stopwatch: Stopwatch,
        parent: Parent | None = None,
    ) -> None:
        """Read, filter and order the events; `limit` is the number of users to keep.

        Items and event types of a `parent` keep their ids. Raises `FindRecError` if the recipe's SQL fails.
        """
        self._recipe = recipe
        self._parent = parent
        self._sql = {"events": recipe.events, "items": recipe.items}
        for source in fetched:
            self._sql = {k: getattr(source.location, k) or v for k, v in self._sql.items()}
        self._db = open_database(scratch, limits)
        self._tables = SourceTables(self._db, scratch, recipe.name, recipe.max_bad_rows)
        try:
            self._build(fetched, limit, stopwatch)
        except BaseException:
            self.close()  # or the next attempt of this process would find its tables
            raise

    def _build(self, fetched: list[Fetched], limit: int | None, stopwatch: Stopwatch) -> None:
        with stopwatch.stage("read"):
            for source in fetched:
                for name, paths in source.files.items():
                    self._tables.declare(name, source.location.files[name], paths)
            self._tables.load(*text_columns(self._db, self._tables, self._sql))
            self._read_events()
            self._read_items()
        with stopwatch.stage("filter"):
            extras = [*self._time[1:], *self.extras]
            self.split, self.filtered = apply_filters(self._db, self._recipe, extras)
        with stopwatch.stage("order"):
            self._number_ids(limit)
            self._order_events()
        if self._tables.bad_rows:
            self.filtered["bad_rows"] = self._tables.bad_rows

    def close(self) -> None:
        """Close the database."""
        self._db.close()

    def _query(self, which: str) -> str:
        """The SQL of `events` or `items`, with its placeholders filled in."""
        return self._tables.fill(self._sql[which])

    def _sql_error(self, which: str, error: duckdb.Error) -> FindRecError:
        message = str(error)
        if "utf-8" in message.lower():
            message += ". Set the `format` and `encoding` (such as latin-1) of the file, or that of read_csv"
        return FindRecError(f"recipe {self._recipe.name}: the {which} SQL fails: {message}")

    def _columns(
        self, which: str, required: tuple[str, ...], optional: tuple[str, ...], *, others: bool = False
    ) -> dict[str, str]:
        """Name and SQL type of the columns that a query selects, with `others` any; refuses wrong ones."""
        try:
            types = describe(self._db, self._query(which))
        except SQL_ERRORS as error:
            raise self._sql_error(which, error) from None
        names = list(types)
        allowed = {*required, *optional, *(names if others else ())} - set(_RESERVED if others else ())
        if not set(required) <= set(names) <= allowed:
            hint = ""
            if any(set(name) & set(",;|\t") for name in names):
                hint = (
                    ". A malformed row can make DuckDB read a header as one name: `format: csv` (or tsv) of "
                    "the file counts and quotes such rows"
                )
            raise FindRecError(
                f"recipe {self._recipe.name}: the {which} SQL selects the columns {names}; it must select "
                f"{list(required)} and may select {list(optional)}"
                f"{f' and others except {list(_RESERVED)}' if others else ''}{hint}"
            )
        check_id_types(self._recipe.name, which, types)
        return types

    def _run(self, which: str, sql: str) -> None:
        try:
            execute(self._db, f"read {which}", sql)
        except duckdb.OutOfMemoryException:
            raise
        except SQL_ERRORS as error:
            raise self._sql_error(which, error) from None

    def _read_events(self) -> None:
        """Create `log`: row (the order of the source), raw_user, raw_item, timestamp and the extras.

        Times of a type with parts of seconds get the column `fraction`, the nanoseconds beyond the timestamp.
        """
        types = self._columns("events", _REQUIRED, _EXTRAS)
        self.extras = [name for name in _EXTRAS if name in types]
        seconds = times.seconds_sql("raw.timestamp", types["timestamp"])
        self._time = ["timestamp"]
        if times.has_fraction(types["timestamp"]):
            self._time.append("fraction")
            seconds += f" AS timestamp, {times.fraction_sql('raw.timestamp', types['timestamp'])}"
        value = "TRY_CAST(raw.value AS DOUBLE)" if types.get("value") == "VARCHAR" else "raw.value"
        extras = "".join(f", {value if n == 'value' else f'raw.{n}'} AS {n}" for n in self.extras)
        self._run(
            "events",
            'CREATE TABLE log AS SELECT row_number() OVER () AS row, raw."user" AS raw_user, '
            f"raw.item AS raw_item, {seconds} AS {self._time[-1]} {extras} "
            f"FROM ({self._query('events')}) AS raw",
        )
        if types.get("value") == "VARCHAR":
            self._check_values()
        condition = "raw_user IS NULL OR raw_item IS NULL OR timestamp IS NULL"
        if empty := fetch_value(self._db, f"SELECT count(*) FROM log WHERE {condition}"):
            raise FindRecError(
                f"recipe {self._recipe.name}: {empty:,} events have no user, item or timestamp; "
                "exclude them in the events SQL"
            )
        condition = f"timestamp NOT BETWEEN {times.EARLIEST} AND {times.LATEST}"
        if odd := fetch_value(self._db, f"SELECT count(*) FROM log WHERE {condition}"):
            example = fetch_value(self._db, f"SELECT timestamp FROM log WHERE {condition} LIMIT 1")
            raise FindRecError(
                f"recipe {self._recipe.name}: {odd:,} events have a timestamp such as {example}, which is no "
                "time in seconds since 1970. Exclude the events whose time is missing (pandas writes NaT as "
                "-9223372036854775808) in the events SQL, and divide nanoseconds by 1e9"
            )

    def _check_values(self) -> None:
        """Raise `FindRecError` if a value selected as text is no number."""
        odd = "raw.value IS NOT NULL AND TRY_CAST(raw.value AS DOUBLE) IS NULL"
        query = f"SELECT raw.value FROM ({self._query('events')}) AS raw WHERE {odd} LIMIT 1"
        if (found := fetch_value(self._db, query)) is not None:
            raise FindRecError(
                f"recipe {self._recipe.name}: the events SQL selects the value {found!r}, which is no "
                "number: convert it there: replace(value, ',', '.'), or regexp_extract(value, '[0-9]+')"
            )

    def _read_items(self) -> None:
        """Create `about` from the items SQL, if there is one: raw and the other columns that it selects."""
        self._about: list[str] = []
        self._further: dict[str, str] = {}  # other columns of the items SQL, with their SQL types
        if not self._sql["items"].strip():
            return
        optional = ("category", *_OPTIONAL_DESCRIPTIONS)
        types = self._columns("items", ("item", "title", "text"), optional, others=True)
        self._about = [name for name in (*_DESCRIPTIONS, *_OPTIONAL_DESCRIPTIONS) if name in types]
        cast = [f"CAST({name} AS VARCHAR) AS {name}" for name in self._about if name != _TIME]
        self._further = {n: plain_type(t) for n, t in types.items() if n not in ("item", *self._about)}
        cast += [f"CAST({identifier(n)} AS {t}) AS {identifier(n)}" for n, t in self._further.items()]
        if _TIME in types:
            cast.append(f"{times.known_seconds_sql(_TIME, types[_TIME])} AS {_TIME}")
        self._run(
            "items",
            f"CREATE TABLE about AS SELECT CAST(item AS VARCHAR) AS raw, {', '.join(cast)} "
            f"FROM ({self._query('items')})",
        )
        if unnamed := fetch_value(self._db, "SELECT count(*) FROM about WHERE raw IS NULL"):
            raise FindRecError(
                f"recipe {self._recipe.name}: {unnamed:,} rows of the items SQL have no item: exclude "
                "them there"
            )
        query = "SELECT raw FROM about GROUP BY raw HAVING count(*) > 1 LIMIT 3"
        if duplicates := self._db.execute(query).fetchall():
            raise FindRecError(
                f"recipe {self._recipe.name}: the items SQL selects some items more than once "
                f"(e.g. {', '.join(str(row[0]) for row in duplicates)})"
            )

    def _number_ids(self, limit: int | None) -> None:
        """Create `users` (u from 0, raw_user, n events) and `items` (item from 1, raw_item, raw).

        `raw_item` is NULL for items without events.
        """
        db = self._db
        execute(
            db,
            "number users",
            f"CREATE TABLE users AS SELECT row_number() OVER (ORDER BY {_sort_key('raw_user')}) - 1 AS u, "
            "raw_user, n FROM (SELECT raw_user, count(*) AS n FROM log GROUP BY raw_user "
            f"HAVING count(*) >= {self._recipe.min_events})",
        )
        if not fetch_value(db, "SELECT count(*) FROM users"):
            raise FindRecError(self._no_events_message())
        if limit is not None:
            db.execute(f"DELETE FROM users WHERE u >= {int(limit)}")
        execute(
            db,
            "number items",
            f"CREATE TABLE items AS SELECT row_number() OVER (ORDER BY {_sort_key('raw_item')}) AS item, "
            "raw_item, CAST(raw_item AS VARCHAR) AS raw "
            "FROM (SELECT DISTINCT raw_item FROM log SEMI JOIN users USING (raw_user))",
        )
        if self._about:
            self._compare_items()
        if self._recipe.unmet_items == "keep" and self._about:
            db.execute(
                f"INSERT INTO items SELECT (SELECT count(*) FROM items) + row_number() OVER "
                f"(ORDER BY {_sort_key('raw')}), NULL, raw FROM about ANTI JOIN items USING (raw)"
            )
        if self._parent is not None:
            renumber_items(db, self._parent)
        counted = db.execute("SELECT n FROM users ORDER BY u").fetchnumpy()["n"]
        self.length = counted.astype(np.int64)

    def _compare_items(self) -> None:
        """Report items without a row in the items SQL, and rows without an event; an error if none match."""
        num_items, num_rows = (
            int(fetch_value(self._db, f"SELECT count(*) FROM {t}")) for t in ("items", "about")
        )
        known = int(fetch_value(self._db, "SELECT count(*) FROM items SEMI JOIN about USING (raw)"))
        message = (
            f"{num_items - known:,} of {num_items:,} items of the events have no row in the items SQL, and "
            f"{num_rows - known:,} of its {num_rows:,} rows no event"
        )
        if num_rows and not known:
            examples = [
                ", ".join(repr(row[0]) for row in self._db.execute(f"SELECT raw FROM {t} LIMIT 3").fetchall())
                for t in ("items", "about")
            ]
            raise FindRecError(
                f"recipe {self._recipe.name}: {message}. Their ids are written differently: {examples[0]} in "
                f"the events, {examples[1]} in the items. Convert one of them in the SQL"
            )
        if known < num_items or known < num_rows:
            say(f"{self._recipe.name}: {message}")

    def _order_events(self) -> None:
        """Create `events` from `log`: item, timestamp and the extras, in the final order."""
        recipe, db = self._recipe, self._db
        columns, join = ", ".join(self._time), ""
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
            # md5 rather than DuckDB's own hash, which may change with its version. Its first 64 bits as a
            # number sort like its text, in less than half the memory.
            tie = f"CAST('0x' || left(md5(concat('{recipe.seed}:', row)), 16) AS UBIGINT), "
        execute(
            db,
            "order events",
            f"CREATE TABLE events AS SELECT item, {columns} "
            f"FROM log JOIN users USING (raw_user) JOIN items USING (raw_item) {join} "
            f"ORDER BY u, {', '.join(self._time)}, {tie} row",
        )
        db.execute("DROP TABLE log")

    def _no_events_message(self) -> str:
        """Error message if the SQL selects no events, or the filters remove all of them."""
        recipe, counts = self._recipe, self.filtered
        if not counts["read"]:
            return f"recipe {recipe.name}: the events SQL selects no rows: check its WHERE and the files"
        reasons = [f"{count:,} removed by {name}" for name, count in counts.items() if name != "read"]
        reasons.append(f"no user has min_events={recipe.min_events} events or more among the rest")
        keys = [name for name in ("min_value", "k_core") if name in counts]
        return (
            f"recipe {recipe.name}: no events are left of {counts['read']:,} read ({', '.join(reasons)}): "
            f"lower the recipe's {', '.join([*keys, 'min_events'])}"
        )

    def users(self) -> pa.ChunkedArray:
        """Raw ids in user order."""
        result = self._db.sql("SELECT CAST(raw_user AS VARCHAR) AS raw FROM users ORDER BY u")
        return result.to_arrow_table()["raw"].cast(pa.string())

    def event_types(self) -> list[str]:
        """Names of the codes in the `event` column; empty if there is no such column."""
        if "event" not in self.extras:
            return []
        return [row[0] for row in self._db.execute("SELECT event FROM event_types ORDER BY code").fetchall()]

    def items(self) -> pa.Table:
        """Item table in id order: raw, title, text, category, if selected image, available_from and others.

        Columns other than raw are null for items without a row of the items SQL. With a parent there is also
        the column `gone`.
        """
        is_listed, join = "false", ""
        if self._about:
            is_listed, join = "a.raw IS NOT NULL", "LEFT JOIN about a ON a.raw = i.raw"
        columns = {"raw": "i.raw"}
        columns |= {name: f"a.{name}" if name in self._about else "NULL" for name in _DESCRIPTIONS}
        columns |= {name: f"a.{name}" for name in _OPTIONAL_DESCRIPTIONS if name in self._about}
        columns |= {identifier(name): f"a.{identifier(name)}" for name in self._further}
        if self._parent is not None:
            columns |= {"has_events": "i.raw_item IS NOT NULL", "is_listed": is_listed}
        selected = ", ".join(f"{sql} AS {name}" for name, sql in columns.items())
        table = self._db.sql(f"SELECT {selected} FROM items i {join} ORDER BY i.item").to_arrow_table()
        types = {_TIME: pa.int64(), "has_events": pa.bool_(), "is_listed": pa.bool_()}
        types |= {name: ARROW_TYPES[sql_type] for name, sql_type in self._further.items()}
        items = table.cast(pa.schema([(name, types.get(name, pa.string())) for name in table.column_names]))
        return items if self._parent is None else inherit_descriptions(self._parent, items)

    def blocks(self) -> Iterator[Block]:
        """The events in final order, `USERS_PER_MEMBER` users at a time."""
        names = ["item", *self._time, *self.extras]
        reader = self._db.sql(f"SELECT {', '.join(names)} FROM events").to_arrow_reader(_ROWS_AT_ONCE)
        buffer: dict[str, NDArray[Any]] = {name: np.empty(0) for name in names}
        with progress("write shards", total=len(self.length), unit="users") as bar:
            for begin in range(0, len(self.length), USERS_PER_MEMBER):
                length = self.length[begin : begin + USERS_PER_MEMBER]
                num_events = int(length.sum())
                if len(buffer["item"]) < num_events:
                    buffer = _read_rows(reader, buffer, num_events)
                columns = {name: values[:num_events] for name, values in buffer.items()}
                fraction = columns.pop("fraction", None)
                yield Block(columns, length, fraction)
                buffer = {name: values[num_events:] for name, values in buffer.items()}
                bar.advance(len(length))


def _read_rows(
    reader: pa.RecordBatchReader, buffer: dict[str, NDArray[Any]], num_rows: int
) -> dict[str, NDArray[Any]]:
    """Extend the columns in `buffer` by as many batches as needed for `num_rows` rows."""
    parts = {name: [values] if len(values) else [] for name, values in buffer.items()}
    count = len(buffer["item"])
    while count < num_rows:
        batch = reader.read_next_batch()
        for name, column in parts.items():
            column.append(batch.column(name).to_numpy(zero_copy_only=False))
        count += batch.num_rows
    return {name: np.concatenate(column) for name, column in parts.items()}
