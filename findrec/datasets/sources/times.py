"""Times in SQL: whole seconds since 1970, rounded down, and the nanoseconds beyond them.

Seconds are what a data folder stores. The nanoseconds are only used to order events and to cut them.
"""

from __future__ import annotations

import math
from decimal import Decimal

NANOSECONDS = 10**9
EARLIEST = -(2**63) // NANOSECONDS + 2  # September 1677: pandas writes NaT, a missing time, as an earlier one
LATEST = 10**17  # nanoseconds since 1970 are larger
_SIGNED = ("TINYINT", "SMALLINT", "INTEGER", "BIGINT", "HUGEINT")
INTEGERS = (*_SIGNED, *(f"U{name}" for name in _SIGNED))
_WHOLE = (*INTEGERS, "DATE")


def has_fraction(sql_type: str) -> bool:
    """Whether values of this type can be parts of seconds."""
    return sql_type.upper() not in _WHOLE


def seconds_sql(column: str, sql_type: str) -> str:
    """SQL for the whole seconds since 1970 of a column of dates, times, numbers or numbers as text."""
    kind = sql_type.upper()
    if kind.startswith(("TIMESTAMP", "DATE")):
        count, unit = _ticks(column, kind)
        return f"({count} - ({count} % {unit} + {unit}) % {unit}) // {unit}"
    if kind in ("DOUBLE", "FLOAT"):
        return f"CASE WHEN isfinite({column}) THEN CAST(floor(CAST({column} AS DOUBLE)) AS BIGINT) END"
    if kind in _WHOLE or not _is_number(kind):
        return f"CAST({column} AS BIGINT)"
    return f"CAST(floor({_decimal(column, kind)}) AS BIGINT)"


def known_seconds_sql(column: str, sql_type: str) -> str:
    """As `seconds_sql`; NULL for a time that is missing as pandas' NaT."""
    seconds = seconds_sql(column, sql_type)
    return f"CASE WHEN {seconds} BETWEEN {EARLIEST} AND {LATEST} THEN {seconds} END"


def fraction_sql(column: str, sql_type: str) -> str:
    """SQL for the nanoseconds of a column beyond its whole seconds; for floats, rounded to microseconds."""
    kind = sql_type.upper()
    if kind.startswith(("TIMESTAMP", "DATE")):
        count, unit = _ticks(column, kind)
        return f"CAST(({count} % {unit} + {unit}) % {unit} * {NANOSECONDS // unit} AS INTEGER)"
    if kind in ("DOUBLE", "FLOAT"):
        beyond = f"CAST({column} AS DOUBLE) - floor(CAST({column} AS DOUBLE))"
        return (
            f"CASE WHEN isfinite({column}) THEN "
            f"CAST(least(round(({beyond}) * 1000000), 999999) AS INTEGER) * 1000 END"
        )
    if kind in _WHOLE or not _is_number(kind):
        return "0"
    value = _decimal(column, kind)
    return f"CAST(({value} - floor({value})) * {NANOSECONDS} AS INTEGER)"


def before_sql(time: int | Decimal, exact: bool) -> str:
    """SQL condition on `timestamp` (and `fraction` where times are `exact`): the event is before `time`."""
    whole = math.floor(time)
    beyond = int((time - whole) * NANOSECONDS)
    if not beyond:
        return f"timestamp < {whole}"
    if not exact:
        return f"timestamp <= {whole}"
    return f"(timestamp < {whole} OR (timestamp = {whole} AND fraction < {beyond}))"


def exact_time(seconds: int, nanoseconds: int) -> int | Decimal:
    """Seconds since 1970 as one number, an integer if there are no nanoseconds."""
    return seconds + Decimal(nanoseconds) / NANOSECONDS if nanoseconds else seconds


def _ticks(column: str, kind: str) -> tuple[str, int]:
    """SQL for the smallest units of time of a column since 1970, and their number in a second."""
    return (f"epoch_ns({column})", NANOSECONDS) if kind == "TIMESTAMP_NS" else (f"epoch_us({column})", 10**6)


def _is_number(kind: str) -> bool:
    return kind in ("VARCHAR", "JSON") or kind.startswith("DECIMAL")


def _decimal(column: str, kind: str) -> str:
    text = f"{column} ->> '$'" if kind == "JSON" else column
    return f"CAST({text} AS DECIMAL(38, 9))"
