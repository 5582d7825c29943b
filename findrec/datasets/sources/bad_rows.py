"""Rows of a file that cannot be read, and the lines of compressed files."""

from __future__ import annotations

import io
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

import pyarrow as pa

from findrec.errors import FindRecError

LONGEST_LINE = 16 << 20  # bytes; a line can hold a whole history. DuckDB's memory grows with it
QUOTED = 3  # bad rows shown in messages
SHOWN = 120  # characters of each
_EXPLANATION = 400  # characters of DuckDB's messages


@dataclass
class BadRows:
    """Rows of a file that could not be read."""

    count: int = 0
    quoted: list[str] = field(default_factory=list)  # the first few, with file, line and reason
    foreign: bool = False  # has bytes that are not UTF-8
    quotes: bool = False  # lost to a quoted field

    def add(self, path: Path, line: int | None, text: str, why: str, rows: int = 1) -> None:
        """Count `rows` and quote the first of them; `line` is its number, None if unknown."""
        self.count += rows
        self.foreign |= "utf-8" in why.lower()
        self.quotes |= "quote" in why.lower()
        if len(self.quoted) < QUOTED:
            shown = text.strip()[:SHOWN]
            where = path.name if line is None else f"{path.name} line {line:,}"
            self.quoted.append(f"{where}: {why}: {shown!r}")


def lines(path: Path) -> Iterator[bytes]:
    """Iterate over the lines of a file, decompressed by its suffix."""
    try:
        with io.BufferedReader(pa.input_stream(str(path), compression="detect")) as stream:
            yield from stream
    except OSError as error:
        raise FindRecError(f"{path} cannot be read: {error}. Fetch it again") from None


def explain(error: Exception) -> str:
    """The message of an error of DuckDB on one line, without its list of options and the SQL."""
    text = str(error).split("Possible fixes")[0].split("Possible solutions")[0].split("\nLINE ")[0]
    found = [line.strip() for line in text.splitlines() if line.strip()]
    return "; ".join(found)[:_EXPLANATION]
