"""Read JSON lines into a DuckDB table; lines that hold no object are counted and skipped."""

from __future__ import annotations

import ast
import json
from collections.abc import Collection
from pathlib import Path

import duckdb

from findrec.datasets.sources.bad_rows import LONGEST_LINE, QUOTED, BadRows, lines
from findrec.datasets.sources.duckdb_engine import (
    BAR_AFTER_S,
    describe,
    execute,
    fetch_value,
    identifier,
    literals,
    pairs,
)
from findrec.datasets.sources.recipe import SourceFile
from findrec.datasets.sources.times import INTEGERS
from findrec.errors import FindRecError
from findrec.progress import progress


class JsonTable:
    """The table of a file of JSON objects (or Python literals), or of all files of a glob.

    Attributes:
        types: SQL type of each column.
        text_type: Columns whose values DuckDB would change (7.10 to 7.1, 7 and "7" to two ids), each with
            another type, by which the SQL shows whether it selects the column.
    """

    def __init__(
        self, db: duckdb.DuckDBPyConnection, file: SourceFile, paths: list[Path], scratch: Path, recipe: str
    ) -> None:
        """Find the fields of the file; raises `duckdb.Error` if that fails."""
        self._db, self._recipe = db, recipe
        self._columns = file.columns
        self._bad = BadRows()
        self._label = paths[0].name
        if file.format == "loose_json":
            paths = [self._strict(path, scratch / f"{n}-{path.name}.jsonl") for n, path in enumerate(paths)]
        self._paths = paths
        self.types = dict(file.columns or {}) or describe(db, f"SELECT * FROM {self._reader(None)}")
        self.text_type = {
            name: "JSON" if kind.upper() == "VARCHAR" else "VARCHAR"
            for name, kind in self.types.items()
            if (kind.upper() == "VARCHAR" if file.columns else kind not in ("VARCHAR", *INTEGERS))
        }

    def _reader(self, columns: dict[str, str] | None) -> str:
        """SQL that reads the fields `columns`, or all with the types that DuckDB guesses."""
        chosen = f"columns={pairs(columns)}" if columns else "sample_size=-1"
        return (
            f"read_json({literals(self._paths)}, format='newline_delimited', records=true, "
            f"ignore_errors=true, maximum_object_size={LONGEST_LINE}, {chosen})"
        )

    def load(self, table: str, ids: Collection[str]) -> BadRows:
        """Create the table; the columns `ids` are read as text, as they are written."""
        raw = {name: "JSON" for name in self.types if name in ids and name in self.text_type}
        if self._columns:
            query = f"SELECT * FROM {self._reader({**self._columns, **raw})}"
        elif raw:  # all fields with their guessed types, beside the ids of the same lines
            names = ", ".join(f"ids.{identifier(name)} AS {identifier(name)}" for name in raw)
            query = f"SELECT line.* REPLACE ({names}) FROM {self._reader(None)} line "
            query += f"POSITIONAL JOIN {self._reader(raw)} ids"
        else:
            query = f"SELECT * FROM {self._reader(None)}"
        execute(self._db, f"read {self._label}", f"CREATE TABLE {table} AS {query}")
        self._drop_empty(table)
        for name in raw:
            self._unwrap(table, name)
        return self._bad

    def _drop_empty(self, table: str) -> None:
        """Remove and count the rows without any field: DuckDB reads bad lines as such."""
        names = list(self.types)
        nothing = " AND ".join(f"{identifier(name)} IS NULL" for name in names)
        empty = int(fetch_value(self._db, f"SELECT count(*) FROM {table} WHERE {nothing}"))
        if not empty:
            return
        num_bad = self._bad.count + empty
        for path in self._paths:  # DuckDB does not report the lines: search for the first few
            for number, line in enumerate(lines(path), 1):
                if self._bad.count >= QUOTED:
                    break
                try:
                    if line.strip() and not set(_object_of(line, loose=False)) & set(names):
                        raise ValueError(f"none of the fields {', '.join(names)}")
                except ValueError as error:
                    self._bad.add(path, number, line.decode(errors="replace"), str(error))
        self._bad.count = num_bad
        self._db.execute(f"DELETE FROM {table} WHERE {nothing}")

    def _unwrap(self, table: str, column: str) -> None:
        """Turn a column of JSON values into text; `FindRecError` for values that are no text or integer."""
        name = identifier(column)
        text = f"{name} ->> '$'"
        odd = fetch_value(
            self._db,
            f"SELECT CAST({name} AS VARCHAR) FROM {table} WHERE json_type({name}) NOT IN ('VARCHAR', 'NULL') "
            f"AND NOT regexp_full_match({text}, '-?[0-9]+') LIMIT 1",
        )
        if odd is not None:
            raise FindRecError(
                f"recipe {self._recipe}: {column!r} of {self._label} holds {odd}: ids must be text or "
                "integers, as 7.10 and 7.1 are the same number. Write them in quotes, or as whole numbers"
            )
        self._db.execute(f"ALTER TABLE {table} ALTER {name} TYPE VARCHAR USING {text}")

    def _strict(self, path: Path, target: Path) -> Path:
        """Convert a file of Python literals to JSON lines."""
        with (
            target.open("w", encoding="utf-8") as out,
            progress(f"read {path.name}", unit="bytes", after_s=BAR_AFTER_S) as bar,
        ):
            unshown = 0
            for line_number, line in enumerate(lines(path), 1):
                if (unshown := unshown + len(line)) > 1 << 20:
                    bar.advance(unshown)
                    unshown = 0
                if not line.strip():
                    continue
                try:
                    out.write(json.dumps(_object_of(line, loose=True), allow_nan=False) + "\n")
                except (ValueError, TypeError, RecursionError) as error:  # TypeError: sets and bytes
                    self._bad.add(path, line_number, line.decode(errors="replace"), str(error))
        return target


def _object_of(line: bytes, loose: bool) -> dict[str, object]:
    """Parse the object in a line; raises `ValueError` if there is none."""
    try:
        text = line.removeprefix(b"\xef\xbb\xbf").decode()
    except UnicodeDecodeError as error:
        raise ValueError(f"not UTF-8 ({error.reason} at byte {error.start})") from None
    try:
        value = json.loads(text)
    except (ValueError, RecursionError) as error:
        if not loose:
            raise ValueError(f"not JSON ({error})") from None
        try:
            value = ast.literal_eval(text.strip())
        except (ValueError, SyntaxError, MemoryError, RecursionError, TypeError):
            raise ValueError("neither JSON nor a Python literal") from None
    if not isinstance(value, dict):
        raise ValueError("not an object")
    return value
