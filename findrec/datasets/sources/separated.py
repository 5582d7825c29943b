"""Read separated text (CSV, TSV, RecBole) into a DuckDB table; bad rows are counted and skipped."""

from __future__ import annotations

from collections.abc import Collection
from pathlib import Path

import duckdb

from findrec.datasets.sources.bad_rows import LONGEST_LINE, QUOTED, SHOWN, BadRows, lines
from findrec.datasets.sources.duckdb_engine import (
    SQL_ERRORS,
    describe,
    execute,
    fetch_value,
    identifier,
    literal,
    literals,
    pairs,
)
from findrec.datasets.sources.recipe import SourceFile
from findrec.datasets.sources.stray_quotes import StrayQuotes
from findrec.errors import FindRecError

_DELIMITERS = {"csv": ",", "tsv": "\t", "recbole": "\t"}
_RECBOLE = {"token": "VARCHAR", "token_seq": "VARCHAR", "float": "DOUBLE", "float_seq": "VARCHAR"}
# The size bounds the memory: by default, DuckDB's buffer of each file holds 16 of the longest lines. It must
# be a power of 2: with odd sizes DuckDB 2.0.1 loses rows where two buffers meet.
_STORE = ["store_rejects=true", f"max_line_size={LONGEST_LINE}", f"buffer_size={LONGEST_LINE}"]
WHOLE_LINES = ["header=false", "auto_detect=false", "strict_mode=false", "columns={'line': 'VARCHAR'}"]
WHOLE_LINES += ["delim='\\0'", "quote=''", "escape=''"]  # each line as one column


class SeparatedTable:
    """The table of a file, or of all files of a glob.

    Attributes:
        types: SQL type of each column, in the order of the file.
        text_type: Columns without a type in the recipe, each with the type by which it is read as written.
    """

    def __init__(
        self, db: duckdb.DuckDBPyConnection, file: SourceFile, paths: list[Path], recipe: str
    ) -> None:
        """Find the columns of the file; raises `duckdb.Error` or `FindRecError` if it has none."""
        self._db, self._file, self._paths = db, file, paths
        self._delimiter = _DELIMITERS[str(file.format)]
        self._quote = file.quote if file.quote is not None else '"' if file.format == "csv" else ""
        self._escape = file.escape if file.escape is not None else self._quote
        self._has_header = file.header is not False
        self._is_known = True  # the columns are given, so DuckDB does not guess
        self.text_type: dict[str, str] = {}
        if file.format == "recbole":
            self.types = _recbole_columns(paths[0], file.encoding, recipe)
        elif not self._has_header:
            self.types = dict(file.columns or {})
        else:
            self.types, self._is_known = self._guess()
            self.text_type = {name: "VARCHAR" for name in self.types if name not in (file.columns or {})}

    def _options(self, quote: str, escape: str) -> list[str]:
        options = [f"header={str(self._has_header).lower()}", f"delim={literal(self._delimiter)}"]
        options += [f"quote={literal(quote)}", f"escape={literal(escape)}"]
        if self._file.encoding:
            options.append(f"encoding={literal(self._file.encoding)}")
        return options

    def _guess(self) -> tuple[dict[str, str], bool]:
        """Columns and types as DuckDB guesses them; also whether the guess had to ignore the quotes."""
        source = literals(self._paths)
        options = [*self._options(self._quote, self._escape), *_STORE]
        types = [f"types={pairs(self._file.columns)}"] if self._file.columns else []
        try:
            return describe(
                self._db, f"SELECT * FROM read_csv({', '.join([source, *options, *types])})"
            ), False
        except duckdb.OutOfMemoryException:
            raise
        except SQL_ERRORS:
            if not self._quote:
                raise
        # A stray quote among the first rows: with the columns of the unquoted text, DuckDB can tell its line.
        query = f"SELECT * FROM read_csv({', '.join([source, *self._options('', ''), *_STORE])})"
        found = {name.strip(self._quote): kind for name, kind in describe(self._db, query).items()}
        headers = {next(lines(path), b"").strip() for path in self._paths}
        if len(headers) > 1:
            raise FindRecError(
                f"{self._paths[0]} and the other files of its glob have different header lines"
            )
        return found | (self._file.columns or {}), True

    def load(self, table: str, text: Collection[str]) -> BadRows:
        """Create the table; the columns `text` are read as they are written."""
        types = self.types | {name: "VARCHAR" for name in text if name in self.text_type}
        options = self._options(self._quote, self._escape)
        if self._is_known:
            options += ["auto_detect=false", f"columns={pairs(types)}"]
        elif given := {n: t for n, t in types.items() if n in text or n in (self._file.columns or {})}:
            options.append(f"types={pairs(given)}")
        bad = read_csv(self._db, table, self._paths, options)
        if bad.quotes:
            bad.count = max(bad.count, self._missing_lines(table, types))
        if self._quote:
            stray = StrayQuotes(self._delimiter, self._quote, self.types, self._paths, self._file.encoding)
            stray.drop_rows(self._db, table, texts(types), bad)
        return bad

    def _missing_lines(self, table: str, types: dict[str, str]) -> int:
        """Lines of the files that are in no row of the table; DuckDB does not report all of them."""
        total = sum(bool(line.strip()) for path in self._paths for line in lines(path))
        total -= len(self._paths) * self._has_header
        breaks = [
            f"sum(len({identifier(c)}) - len(replace({identifier(c)}, chr(10), '')))" for c in texts(types)
        ]
        query = "SELECT count(*)" + "".join(f" + coalesce({one}, 0)" for one in breaks)
        return total - int(fetch_value(self._db, f"{query} FROM {table}"))


def read_csv(db: duckdb.DuckDBPyConnection, table: str, paths: list[Path], options: list[str]) -> BadRows:
    """Create a table with DuckDB's `read_csv`; bad rows are counted and left out."""
    options = [*options, "filename=false", *_STORE]
    for kind in ("errors", "scans"):
        db.execute(f"DROP TABLE IF EXISTS reject_{kind}")
    execute(
        db,
        f"read {paths[0].name}",
        f"CREATE TABLE {table} AS SELECT * FROM read_csv({literals(paths)}, {', '.join(options)})",
    )
    # A row with several errors has several entries.
    rows = (
        "FROM (SELECT DISTINCT ON (scan_id, file_id, line_byte_position) * FROM reject_errors "
        "ORDER BY column_idx)"
    )
    bad = BadRows()
    shown = db.execute(
        f"SELECT file_path, line, csv_line, error_message, error_type {rows} JOIN reject_scans "
        f"USING (scan_id, file_id) ORDER BY file_path, line LIMIT {QUOTED}"
    ).fetchall()
    for path, line, text, why, kind in shown:
        why = "not UTF-8" if kind == "INVALID ENCODING" else str(why).splitlines()[0]
        bad.add(Path(path), int(line), str(text or ""), why)
    bad.count = int(fetch_value(db, f"SELECT count(*) {rows}"))
    spans = "('UNQUOTED VALUE', 'LINE SIZE OVER MAXIMUM')"
    bad.quotes = bool(fetch_value(db, f"SELECT count(*) FROM reject_errors WHERE error_type IN {spans}"))
    return bad


def _recbole_columns(path: Path, encoding: str | None, recipe: str) -> dict[str, str]:
    """Names and SQL types in the header `name:type` of an atomic file."""
    try:
        header = next(lines(path), b"").decode(encoding or "utf-8", errors="replace")
    except LookupError:
        raise FindRecError(f"recipe {recipe}: unknown encoding {encoding!r}") from None
    columns = {}
    for entry in header.removeprefix("\ufeff").rstrip("\r\n").split("\t"):
        name, _, kind = entry.partition(":")
        if kind not in _RECBOLE:
            raise FindRecError(
                f"recipe {recipe}: {path} has no RecBole header: {entry[:SHOWN]!r} is not "
                f"name:type with one of the types {', '.join(_RECBOLE)}, separated by tabs"
            )
        columns[name] = _RECBOLE[kind]
    return columns


class OwnCsvTable:
    """The table of `read_csv({name}, ...)` in the SQL, where DuckDB guesses what its options leave open.

    Attributes:
        types: SQL type of each column.
        text_type: The same columns with the type by which they are read as written.
    """

    def __init__(self, db: duckdb.DuckDBPyConnection, paths: list[Path], options: str) -> None:
        """Find the columns; raises `duckdb.Error` if `read_csv` fails."""
        self._db, self._paths = db, paths
        self._options = [literals(paths), *([options] if options else [])]
        self.types = describe(db, f"SELECT * FROM read_csv({', '.join(self._options)})")
        self.text_type = dict.fromkeys(self.types, "VARCHAR")
        one = ", ".join([literal(paths[0]), *self._options[1:]])
        query = f"SELECT Delimiter, Quote, HasHeader FROM sniff_csv({one})"
        self._delimiter, self._quote, has_header = db.execute(query).fetchall()[0]
        if "header" not in options.lower():  # it could be guessed differently once columns are text
            self._options.append(f"header={str(bool(has_header)).lower()}")

    def load(self, table: str, text: Collection[str]) -> BadRows:
        """Create the table; the columns `text` are read as they are written."""
        as_text = {name: "VARCHAR" for name in self.types if name in text}
        options = [*self._options, *([f"types={pairs(as_text)}"] if as_text else [])]
        query = f"SELECT * FROM read_csv({', '.join(options)})"
        execute(self._db, f"read {self._paths[0].name}", f"CREATE TABLE {table} AS {query}")
        bad = BadRows()
        if len(self._quote) == 1:  # "(empty)" for none
            stray = StrayQuotes(self._delimiter, self._quote, self.types, self._paths)
            stray.drop_rows(self._db, table, texts(self.types | as_text), bad)
        return bad


def texts(types: dict[str, str]) -> list[str]:
    """The columns of type VARCHAR."""
    return [name for name, kind in types.items() if kind == "VARCHAR"]
