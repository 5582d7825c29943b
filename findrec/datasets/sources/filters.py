"""Apply a recipe's filters to the table `log` in DuckDB: `min_value`, `duplicates`, `k_core`, in this order.

Filters keep the row numbers of the source.
"""

from __future__ import annotations

import itertools
import math
from decimal import Decimal
from fractions import Fraction

import duckdb

from findrec.datasets.folder.splits import Split
from findrec.datasets.sources.duckdb_engine import execute, fetch_value
from findrec.datasets.sources.recipe import KCore, Recipe
from findrec.datasets.sources.times import before_sql, exact_time
from findrec.errors import FindRecError
from findrec.progress import say

TIME_BINS = 1 << 16  # histogram bins of the time axis, for quantiles


def _size(db: duckdb.DuckDBPyConnection, table: str = "log") -> int:
    return int(fetch_value(db, f"SELECT count(*) FROM {table}"))


def _replace_log(db: duckdb.DuckDBPyConnection, label: str, query: str) -> int:
    """Replace `log` by the result of `query`, in any order, and return the number of removed events."""
    before = _size(db)
    execute(db, label, f"CREATE TABLE kept AS {query}")
    db.execute("DROP TABLE log")
    db.execute("ALTER TABLE kept RENAME TO log")
    return before - _size(db)


def resolve_cuts(db: duckdb.DuckDBPyConnection, split: Split, exact: bool = False) -> Split:
    """Replace the `quantiles` of a split by the corresponding times of `log`; other splits are unchanged.

    If times are `exact`, `log` has the column `fraction`, the nanoseconds beyond the timestamp.
    """
    if split.quantiles is None or not (size := _size(db)):
        return split
    valid, test = (_kth_time(db, max(1, math.ceil(size * Fraction(repr(q)))), exact) for q in split.quantiles)
    return split.model_copy(update={"valid_from": valid, "test_from": test})


def _kth_time(db: duckdb.DuckDBPyConnection, k: int, exact: bool) -> int | Decimal:
    """Return the k-th smallest time of `log`, counting from 1.

    DuckDB's quantile functions hold all values in memory. Here one pass counts the events of wide time bins
    and a second one counts the timestamps inside the bin that contains the result.
    """
    low, high = db.execute("SELECT min(timestamp), max(timestamp) FROM log").fetchall()[0]
    width = (high - low) // TIME_BINS + 1
    bins = f"SELECT (timestamp - {low}) // {width} AS bin, count(*) AS n FROM log GROUP BY 1 ORDER BY 1"
    times = f"SELECT timestamp, {'fraction' if exact else '0'}, count(*) FROM log "
    times += "WHERE timestamp >= {} AND timestamp < {} GROUP BY ALL ORDER BY ALL"
    for number, count in db.execute(bins).fetchall():
        if k <= count:
            begin = low + number * width
            break
        k -= count
    for seconds, nanoseconds, count in db.execute(times.format(begin, begin + width)).fetchall():
        if k <= count:
            return exact_time(int(seconds), int(nanoseconds))
        k -= count
    raise AssertionError("the bins contain every event")


def _drop_outside_core(db: duckdb.DuckDBPyConnection, core: KCore, before: str | None) -> int:
    """Remove users and items with too few events, repeatedly, until all that are left have enough.

    With `before`, the SQL condition of events before a time, only those are counted. Later events of users
    outside the core are removed, but items are kept whatever their count (new ones are cold items), so later
    events have no influence.

    Each round updates only the counts `n` of users and items, by subtracting those of what was removed. The
    events are written once, at the end.
    """
    past = "log" if before is None else f"(SELECT * FROM log WHERE {before})"
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
            "remove users and items outside the core",
            f"UPDATE left_{other} SET n = left_{other}.n - lost.n FROM ({lost}) AS lost "
            f"WHERE left_{other}.{other} = lost.{other}",
        )
    of_users = "SEMI JOIN left_raw_user USING (raw_user)"
    query = f"SELECT * FROM {past} {of_users} SEMI JOIN left_raw_item USING (raw_item)"
    if before is not None:
        query += f" UNION ALL SELECT * FROM log {of_users} WHERE NOT {before}"
    num_removed = _replace_log(db, "keep the core", query)
    for name in ("left_raw_user", "left_raw_item", "low"):
        db.execute(f"DROP TABLE {name}")
    return num_removed


def apply_filters(
    db: duckdb.DuckDBPyConnection, recipe: Recipe, extras: list[str]
) -> tuple[Split, dict[str, int]]:
    """Filter `log` (row, raw_user, raw_item, timestamp and `extras`, such as fraction) in place.

    Returns:
        The split with its cut times, and numbers of events: `read`, and those removed by each filter key.

    Raises:
        FindRecError: If `min_value` lacks a `value` column, or no event is left for training.
    """
    exact = "fraction" in extras
    counts = {"read": _size(db)}
    if recipe.min_value is not None:
        if "value" not in extras:
            raise FindRecError(
                f"recipe {recipe.name}: min_value needs a column `value`, which the events SQL lacks"
            )
        counts["min_value"] = _replace_log(
            db, "remove low values", f"SELECT * FROM log WHERE value >= {recipe.min_value!r}"
        )
    if recipe.duplicates == "drop":
        key = ", ".join(["raw_user, raw_item, timestamp", *(n for n in ("fraction", "event") if n in extras)])
        first = f"SELECT min(row) AS row FROM log GROUP BY {key}"
        counts["duplicates"] = _replace_log(
            db, "remove duplicates", f"SELECT * FROM log SEMI JOIN ({first}) USING (row)"
        )
    split = resolve_cuts(db, recipe.split, exact)
    before = None if split.valid_from is None else before_sql(split.valid_from, exact)
    if recipe.k_core is not None and counts["read"]:
        counts["k_core"] = _drop_outside_core(db, recipe.k_core, before)
    if before is not None and not (
        fetch_value(db, f"SELECT count(*) FROM log WHERE {before}") or not _size(db)
    ):
        raise FindRecError(
            f"recipe {recipe.name}: no event is earlier than the split's first cut ({split.valid_from} s "
            "since 1970), so there are no training events. Set earlier times, or check that the unit of "
            "`timestamp` is seconds"
        )
    removed = [f"{count:,} by {name}" for name, count in counts.items() if name != "read"]
    if removed:
        say(f"{recipe.name}: events removed, of {counts['read']:,}: {', '.join(removed)}")
    return split, counts
