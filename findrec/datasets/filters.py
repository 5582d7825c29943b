"""The recipe's filters on the table `log`, in DuckDB's SQL (on disk where memory is short).

In this order: `min_value`, `duplicates`, `k_core`. Each leaves the row numbers of the source as they are.
"""

from __future__ import annotations

import itertools
import math
from fractions import Fraction
from typing import Any

import duckdb

from findrec.datasets.engine import execute
from findrec.datasets.recipe import KCore, Recipe
from findrec.datasets.splits import Split
from findrec.errors import FindRecError
from findrec.progress import say

TIME_BINS = 1 << 16  # of the time axis, when a quantile is looked for


def _value(db: duckdb.DuckDBPyConnection, sql: str) -> Any:
    row = db.execute(sql).fetchone()
    return row[0] if row else None


def _size(db: duckdb.DuckDBPyConnection, table: str = "log") -> int:
    return int(_value(db, f"SELECT count(*) FROM {table}"))


def _keep(db: duckdb.DuckDBPyConnection, what: str, query: str) -> int:
    """Make `log` what `query` gives of it, in any order (`row` knows the source's); returns how many events
    that left out.
    """
    before = _size(db)
    execute(db, what, f"CREATE TABLE kept AS {query}")
    db.execute("DROP TABLE log")
    db.execute("ALTER TABLE kept RENAME TO log")
    return before - _size(db)


def resolve_cuts(db: duckdb.DuckDBPyConnection, split: Split) -> Split:
    """The split with the two times that its `quantiles` mean in `log`; other splits as they are."""
    if split.quantiles is None or not (size := _size(db)):
        return split
    valid, test = (_kth_time(db, max(1, math.ceil(size * Fraction(repr(q))))) for q in split.quantiles)
    return split.model_copy(update={"valid_from": valid, "test_from": test})


def _kth_time(db: duckdb.DuckDBPyConnection, k: int) -> int:
    """The k-th smallest timestamp of `log`, counting from 1.

    DuckDB's own quantile holds all values in memory. Here a first pass counts the events of wide bins, a
    second the timestamps inside the one that matters.
    """
    low, high = db.execute("SELECT min(timestamp), max(timestamp) FROM log").fetchall()[0]
    width = (high - low) // TIME_BINS + 1
    bins = f"SELECT (timestamp - {low}) // {width} AS place, count(*) AS n FROM log GROUP BY 1 ORDER BY 1"
    times = (
        "SELECT timestamp, count(*) FROM log WHERE timestamp >= {} AND timestamp < {} GROUP BY 1 ORDER BY 1"
    )
    for place, count in db.execute(bins).fetchall():
        if k <= count:
            begin = low + place * width
            break
        k -= count
    for time, count in db.execute(times.format(begin, begin + width)).fetchall():
        if k <= count:
            return int(time)
        k -= count
    raise AssertionError("the bins count every event")


def _drop_outside_core(db: duckdb.DuckDBPyConnection, core: KCore, cut: int | None) -> int:
    """Repeat until nothing changes: leave out users and items with too few events among those that are left.

    With `cut` only earlier events count. Of the later ones those of a user outside the core go, while items
    stay whatever their count (what is new then is a cold item): no later event decides what stays.

    Only the counts of users and items are kept up to date (`n` events with what is left of the other side):
    what leaves is subtracted. The events are looked through in each round and written once, at the end.
    """
    past = "log" if cut is None else f"(SELECT * FROM log WHERE timestamp < {cut})"
    sides = (("raw_user", core.users), ("raw_item", core.items))
    for side, _ in sides:
        count = f"CREATE TEMP TABLE left_{side} AS SELECT {side}, count(*) AS n FROM {past} GROUP BY {side}"
        execute(db, "count for the core", count)
    unchanged = 0
    for (side, least), (other, _) in itertools.cycle((sides, sides[::-1])):
        db.execute(f"CREATE OR REPLACE TEMP TABLE low AS SELECT {side} FROM left_{side} WHERE n < {least}")
        unchanged = 0 if _size(db, "low") else unchanged + 1
        if unchanged == len(sides):
            break
        if unchanged:
            continue
        db.execute(f"DELETE FROM left_{side} WHERE n < {least}")
        lost = (
            f"SELECT {other}, count(*) AS n FROM {past} SEMI JOIN low USING ({side}) "
            f"SEMI JOIN left_{other} USING ({other}) GROUP BY {other}"
        )
        execute(
            db,
            "leave out what is outside the core",
            f"UPDATE left_{other} SET n = left_{other}.n - lost.n FROM ({lost}) AS lost "
            f"WHERE left_{other}.{other} = lost.{other}",
        )
    of_users = "SEMI JOIN left_raw_user USING (raw_user)"
    query = f"SELECT * FROM {past} {of_users} SEMI JOIN left_raw_item USING (raw_item)"
    if cut is not None:
        query += f" UNION ALL SELECT * FROM log {of_users} WHERE timestamp >= {cut}"
    left_out = _keep(db, "keep the core", query)
    for name in ("left_raw_user", "left_raw_item", "low"):
        db.execute(f"DROP TABLE {name}")
    return left_out


def apply_filters(
    db: duckdb.DuckDBPyConnection, recipe: Recipe, extras: list[str]
) -> tuple[Split, dict[str, int]]:
    """Filter `log` (row, raw_user, raw_item, timestamp and `extras`) in place.

    Returns the split with its cut times and the number of events: `read`, then what each filter of the
    recipe left out, by its key. `FindRecError` where `min_value` has no `value` column to look at.
    """
    counts = {"read": _size(db)}
    if recipe.min_value is not None:
        if "value" not in extras:
            raise FindRecError(
                f"recipe {recipe.name}: min_value needs a column `value`, which the events SQL does not give"
            )
        counts["min_value"] = _keep(
            db, "leave out low values", f"SELECT * FROM log WHERE value >= {recipe.min_value!r}"
        )
    if recipe.duplicates == "drop":
        same = ", ".join(["raw_user", "raw_item", "timestamp", *(name for name in extras if name == "event")])
        first = f"SELECT min(row) AS row FROM log GROUP BY {same}"
        counts["duplicates"] = _keep(
            db, "leave out duplicates", f"SELECT * FROM log SEMI JOIN ({first}) USING (row)"
        )
    split = resolve_cuts(db, recipe.split)
    if recipe.k_core is not None and counts["read"]:
        counts["k_core"] = _drop_outside_core(db, recipe.k_core, split.valid_from)
    if split.valid_from is not None and not (
        _value(db, f"SELECT count(*) FROM log WHERE timestamp < {split.valid_from}") or not _size(db)
    ):
        raise FindRecError(
            f"recipe {recipe.name}: no event is earlier than the split's first cut ({split.valid_from} s "
            "since 1970): nothing could be trained on. Give earlier times, or check the unit of `timestamp` "
            "(seconds)"
        )
    told = [f"{count:,} by {name}" for name, count in counts.items() if name != "read"]
    if told:
        say(f"{recipe.name}: of {counts['read']:,} events left out: {', '.join(told)}")
    return split, counts
