"""DuckDB at work: how much memory it takes, where it puts what does not fit, and what is shown meanwhile.

Left to itself DuckDB takes 80 % of the machine's memory, which other processes of a training need too. Here
it gets a bounded share and spills the rest to the scratch folder.
"""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import duckdb

from findrec.errors import FindRecError
from findrec.progress import format_seconds, progress

MEMORY_GIB = 3.0  # by default, and never more than half of the machine's
LEAST_MEMORY_GIB = 0.25
TOLD_AFTER_S = 1.0  # statements that are done earlier show no bar
_POLL_S = 0.2


def _number(name: str, given: float | None) -> float | None:
    """The option, else the environment's variable of that name."""
    text = os.environ.get(name, "").strip()
    if given is not None or not text:
        return given
    try:
        return float(text)
    except ValueError:
        raise FindRecError(f"{name}={text!r} is no number") from None


@dataclass(frozen=True)
class Limits:
    """What `prepare` may use: GiB of memory for DuckDB, threads, and a folder for temporary files (None:
    beside the data folder). They change the time, never the data.
    """

    memory_gib: float
    threads: int
    scratch: Path | None = None

    @staticmethod
    def of(
        memory_gib: float | None = None, threads: int | None = None, scratch: Path | None = None
    ) -> Limits:
        """Each limit as given, else from `FINDREC_MEMORY_GIB`, `FINDREC_THREADS`, `FINDREC_SCRATCH`, else the
        default: 3 GiB or half of the memory, all cores, beside the data folder.
        """
        half = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**31
        memory = _number("FINDREC_MEMORY_GIB", memory_gib)
        memory = min(MEMORY_GIB, half) if memory is None else memory
        cores = _number("FINDREC_THREADS", threads)
        cores = (os.cpu_count() or 1) if cores is None else cores
        if not memory >= LEAST_MEMORY_GIB:
            raise FindRecError(f"{memory:g} GiB of memory are too few: give {LEAST_MEMORY_GIB:g} or more")
        if cores < 1 or cores != int(cores):
            raise FindRecError(f"{cores:g} threads: give a whole number from 1 on")
        if scratch is None and (named := os.environ.get("FINDREC_SCRATCH", "").strip()):
            scratch = Path(named).expanduser().absolute()
        return Limits(memory, int(cores), scratch)

    def __str__(self) -> str:
        threads = f"{self.threads} thread{'s' if self.threads > 1 else ''}"
        return f"DuckDB gets {self.memory_gib:.3g} GiB of memory and {threads}"


def open_database(scratch: Path, limits: Limits) -> duckdb.DuckDBPyConnection:
    """A throw-away database in `scratch`, which also takes what does not fit into memory."""
    db = duckdb.connect(str(scratch / "log.duckdb"))
    db.execute(f"SET memory_limit = '{limits.memory_gib * 1024:.0f}MiB'")
    db.execute(f"SET threads = {limits.threads}")
    db.execute("SET temp_directory = '" + str(scratch).replace("'", "''") + "'")
    db.execute("SET preserve_insertion_order = true")  # the row number is the order of the source
    db.execute("SET enable_progress_bar = true")  # counted, not printed: the bar is ours
    db.execute("SET enable_progress_bar_print = false")
    return db


def execute(db: duckdb.DuckDBPyConnection, what: str, sql: str) -> None:
    """Run a statement, with a bar called `what` where it takes more than a second; its error is raised."""
    failed: list[BaseException] = []

    def work() -> None:
        try:
            db.execute(sql)
        except BaseException as error:
            failed.append(error)

    thread = threading.Thread(target=work, name="findrec-duckdb", daemon=True)
    with progress(what, total=100, unit="%", after_s=TOLD_AFTER_S) as bar:
        thread.start()
        try:
            thread.join(_POLL_S / 10)
            while thread.is_alive():
                bar.advance(max(0, int(db.query_progress()) - bar.done))  # -1 where it cannot tell
                thread.join(_POLL_S)
        except BaseException:
            db.interrupt()
            thread.join()
            raise
        if failed:
            raise failed[0]
        bar.advance(100 - bar.done)


class Stopwatch:
    """Seconds of each named stage, in the order in which they were first entered."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}

    @contextmanager
    def stage(self, name: str) -> Iterator[None]:
        """Add the time inside the block to the stage."""
        begin = time.perf_counter()
        try:
            yield
        finally:
            self.seconds[name] = self.seconds.get(name, 0.0) + time.perf_counter() - begin

    @property
    def total(self) -> float:
        """Seconds of all stages."""
        return sum(self.seconds.values())

    def __str__(self) -> str:
        return ", ".join(f"{name} {format_seconds(seconds)}" for name, seconds in self.seconds.items())
