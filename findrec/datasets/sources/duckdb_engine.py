"""DuckDB with bounded memory, spilling to disk, and progress bars for long statements.

By default DuckDB takes 80 % of the machine's memory, which the other processes of a run need too.
"""

from __future__ import annotations

import os
import re
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import duckdb
import pyarrow as pa

from findrec.errors import FindRecError
from findrec.progress import format_seconds, progress

MEMORY_GIB = 3.0  # default; at most half of the machine's memory
MIN_MEMORY_GIB = 0.25
# DuckDB's own, Arrow's in fetching results, and that of a message with text in another encoding.
SQL_ERRORS: tuple[type[Exception], ...] = (duckdb.Error, pa.ArrowException, UnicodeDecodeError)
BAR_AFTER_S = 1.0  # shorter statements show no progress bar
_POLL_S = 0.2


def _option(name: str, value: float | None) -> float | None:
    """Return `value`, or the number in the environment variable `name`, or None."""
    text = os.environ.get(name, "").strip()
    if value is not None or not text:
        return value
    try:
        return float(text)
    except ValueError:
        raise FindRecError(f"{name}={text!r} is not a number") from None


@dataclass(frozen=True)
class Limits:
    """Resources that `prepare` may use. They change the running time, never the data."""

    memory_gib: float  # for DuckDB
    threads: int
    scratch: Path | None = None  # folder for temporary files; None: next to the data folder

    @staticmethod
    def of(
        memory_gib: float | None = None, threads: int | None = None, scratch: Path | None = None
    ) -> Limits:
        """Fill in missing limits from the environment, then from the defaults.

        The variables are `FINDREC_MEMORY_GIB`, `FINDREC_THREADS` and `FINDREC_SCRATCH`; the defaults are 3
        GiB or half of the machine's memory, all cores, and the folder that contains the data folder.
        """
        half = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**31
        memory = _option("FINDREC_MEMORY_GIB", memory_gib)
        memory = min(MEMORY_GIB, half) if memory is None else memory
        cores = _option("FINDREC_THREADS", threads)
        cores = (os.cpu_count() or 1) if cores is None else cores
        if not memory >= MIN_MEMORY_GIB:
            raise FindRecError(f"{memory:g} GiB of memory are too few: use {MIN_MEMORY_GIB:g} or more")
        if cores < 1 or cores != int(cores):
            raise FindRecError(f"{cores:g} threads: use a whole number of at least 1")
        if scratch is None and (folder := os.environ.get("FINDREC_SCRATCH", "").strip()):
            scratch = Path(folder).expanduser().absolute()
        return Limits(memory, int(cores), scratch)

    def __str__(self) -> str:
        threads = f"{self.threads} thread{'s' if self.threads > 1 else ''}"
        return f"DuckDB gets {self.memory_gib:.3g} GiB of memory and {threads}"


def open_database(scratch: Path, limits: Limits) -> duckdb.DuckDBPyConnection:
    """Open a temporary database in the folder `scratch`, to which DuckDB also spills."""
    db = duckdb.connect(str(scratch / "log.duckdb"))
    db.execute(f"SET memory_limit = '{limits.memory_gib * 1024:.0f}MiB'")
    db.execute(f"SET threads = {limits.threads}")
    db.execute("SET temp_directory = '" + str(scratch).replace("'", "''") + "'")
    db.execute("SET preserve_insertion_order = true")  # row numbers follow the order of the source
    db.execute("SET enable_progress_bar = true")  # needed for query_progress(); the bar is our own
    db.execute("SET enable_progress_bar_print = false")
    return db


def fetch_value(db: duckdb.DuckDBPyConnection, sql: str) -> Any:
    """Run a query and return the first value of its first row; None if there is none."""
    rows = db.execute(sql).fetchall()  # all: DuckDB refuses other work beside an unfinished result
    return rows[0][0] if rows else None


def execute(db: duckdb.DuckDBPyConnection, label: str, sql: str) -> None:
    """Run a statement; if it takes more than a second, show a progress bar named `label`."""
    errors: list[BaseException] = []

    def work() -> None:
        try:
            db.execute(sql)
        except BaseException as error:
            errors.append(error)

    thread = threading.Thread(target=work, name="findrec-duckdb", daemon=True)
    with progress(label, total=100, unit="%", after_s=BAR_AFTER_S) as bar:
        thread.start()
        try:
            thread.join(_POLL_S / 10)
            while thread.is_alive():
                bar.advance(max(0, int(db.query_progress()) - bar.done))  # -1 if unknown
                thread.join(_POLL_S)
        except BaseException:
            db.interrupt()
            thread.join()
            raise
        if errors:
            raise errors[0]
        bar.advance(100 - bar.done)


def literal(text: object) -> str:
    """A string as SQL writes it."""
    return "'" + str(text).replace("'", "''") + "'"


def literals(paths: list[Path]) -> str:
    """One path, or a list of them, as SQL writes it."""
    quoted = [literal(path) for path in paths]
    return quoted[0] if len(quoted) == 1 else f"[{', '.join(quoted)}]"


def pairs(columns: dict[str, str]) -> str:
    """Columns and types as SQL writes them."""
    return "{" + ", ".join(f"{literal(name)}: {literal(kind)}" for name, kind in columns.items()) + "}"


def describe(db: duckdb.DuckDBPyConnection, query: str) -> dict[str, str]:
    """Name and SQL type of the columns of a query."""
    return {row[0]: row[1] for row in db.execute(f"DESCRIBE {query}").fetchall()}


def identifier(name: str) -> str:
    """The name of a column as SQL writes it."""
    return '"' + name.replace('"', '""') + '"'


class Stopwatch:
    """Seconds spent in each named stage, in the order in which the stages were first entered."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}

    @contextmanager
    def stage(self, name: str) -> Iterator[None]:
        """Add the time inside the block to the stage."""
        start = time.perf_counter()
        try:
            yield
        finally:
            self.seconds[name] = self.seconds.get(name, 0.0) + time.perf_counter() - start

    @property
    def total(self) -> float:
        """Seconds of all stages."""
        return sum(self.seconds.values())

    def __str__(self) -> str:
        return ", ".join(f"{name} {format_seconds(seconds)}" for name, seconds in self.seconds.items())


ARROW_TYPES = {"BIGINT": pa.int64(), "DOUBLE": pa.float64(), "BOOLEAN": pa.bool_(), "VARCHAR": pa.string()}
ARROW_TYPES["VARCHAR[]"] = pa.list_(pa.string())


def plain_type(sql_type: str) -> str:
    """The SQL type in which a further column of the items is kept: a key of `ARROW_TYPES`."""
    if re.fullmatch(r"U?(TINY|SMALL|BIG)INT|U?INTEGER", sql_type) and sql_type != "UBIGINT":
        return "BIGINT"
    if re.match(r"U?BIGINT|U?HUGEINT|DECIMAL|FLOAT|DOUBLE", sql_type) and not sql_type.endswith("]"):
        return "DOUBLE"
    return sql_type if sql_type == "BOOLEAN" else "VARCHAR[]" if sql_type.endswith("[]") else "VARCHAR"
