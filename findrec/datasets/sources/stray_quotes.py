"""Find rows of a CSV with a field between two stray quotes, which swallowed the lines between them.

Such a field has the columns of the rows between its quotes; a text of several lines does not.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import duckdb

from findrec.datasets.sources.bad_rows import QUOTED, SHOWN, BadRows, lines
from findrec.datasets.sources.duckdb_engine import identifier, literal

_MANY_LINES = 5  # of a field that look like rows, if no column has a type to tell rows from text


@dataclass(frozen=True)
class StrayQuotes:
    """The dialect and columns of the files in which stray quotes are found."""

    delimiter: str
    quote: str
    types: dict[str, str]  # SQL type of each column by its values
    paths: list[Path]
    encoding: str | None = None

    def drop_rows(self, db: duckdb.DuckDBPyConnection, table: str, texts: list[str], bad: BadRows) -> None:
        """Remove such rows from a table and add them to `bad`; `texts` are its columns of text."""
        for column in texts:
            name = identifier(column)
            condition = f"contains({name}, chr(10)) AND {self._is_swallowed(column)}"
            found = db.execute(
                f"SELECT {name}, len({name}) - len(replace({name}, chr(10), '')) + 1 FROM {table} "
                f"WHERE {condition}"
            ).fetchall()
            for value, rows in found:
                first = str(value).splitlines()[0]
                path, line = (None, None) if len(bad.quoted) >= QUOTED else self._find(self.quote + first)
                why = f"a quoted field goes on for {rows:,} lines, which look like rows"
                bad.add(path or self.paths[0], line, self.quote + str(value)[:SHOWN], why, rows)
            if found:
                db.execute(f"DELETE FROM {table} WHERE {condition}")

    def _is_swallowed(self, column: str) -> str:
        """SQL condition: the lines of a column's value have the fields of rows that it interrupts."""
        names, delimiter = list(self.types), literal(self.delimiter)
        index, width = names.index(column), len(names)
        pieces = f"string_split(replace({identifier(column)}, chr(13), ''), chr(10))"
        first, last = (f"string_split({pieces}[{at}], {delimiter})" for at in (1, -1))
        inner = f"string_split(line, {delimiter})"
        conditions = [f"len({first}) = {width - index}", f"len({last}) = {index + 1}"]
        fits = [f"len({inner}) = {width}"]
        typed = []
        for at, kind in enumerate(self.types.values()):
            if kind == "VARCHAR" or at == index:
                continue
            field = f"{first}[{at - index + 1}]" if at > index else f"{last}[{at + 1}]"
            conditions.append(f"(trim({field}) = '' OR TRY_CAST({field} AS {kind}) IS NOT NULL)")
            field_of_line = f"{inner}[{at + 1}]"
            fits.append(f"(trim({field_of_line}) = '' OR TRY_CAST({field_of_line} AS {kind}) IS NOT NULL)")
            typed.append(f"TRY_CAST({field} AS {kind}) IS NOT NULL")
        conditions.append(f"({' OR '.join(typed)})" if typed else f"len({pieces}) >= {_MANY_LINES}")
        conditions.append(f"len(list_filter({pieces}[2:-2], lambda line: NOT ({' AND '.join(fits)}))) = 0")
        return " AND ".join(conditions)

    def _find(self, ending: str) -> tuple[Path | None, int | None]:
        """The file and number of the first line with this ending."""
        wanted = ending.encode(self.encoding or "utf-8", errors="replace")
        for path in self.paths:
            for number, line in enumerate(lines(path), 1):
                if line.rstrip(b"\r\n").endswith(wanted):
                    return path, number
        return None, None
