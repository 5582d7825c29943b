"""Raw files of a stated format as tables of DuckDB, with their bad rows counted and quoted.

A file with a `format` in the recipe becomes a table that the SQL names `{like_this}`; without one the SQL
reads the file itself. Compressed files (`.gz`, `.zst`) are read as they are. A row that cannot be read is
left out and counted; too many of them stop the work.

* `csv`, `tsv`: a header line unless `header: false`; then `columns` names all columns and their SQL types.
* `jsonl`: one JSON object a line. `columns` picks fields and gives their types.
* `loose_json`: the same with Python literals (`{'asin': ...}`), as the metadata of Amazon 2014 are written.
* `parquet`.
* `sequences`: `user item item ...` a line, oldest first, separated by blanks, tabs or commas. The table has
  user, item and timestamp, which is the item's position from 1 on: such files know the order alone.
* `recbole`: atomic files, tab-separated, with a header of `name:type`; columns are called by the bare name.
"""

from __future__ import annotations

import ast
import io
import json
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

import duckdb
import pyarrow as pa

from findrec.datasets.engine import TOLD_AFTER_S, execute
from findrec.datasets.recipe import SourceFile
from findrec.errors import FindRecError
from findrec.progress import progress, say

_LONGEST_LINE = 64 << 20  # bytes; a line of a whole history is long
_WHOLE = ("delim='\\0'", "quote=''", "escape=''")  # a line as one column
_QUOTED = 3  # bad rows that are shown
_SHOWN = 120  # characters of each
_RECBOLE = {"token": "VARCHAR", "token_seq": "VARCHAR", "float": "DOUBLE", "float_seq": "VARCHAR"}


def literal(text: object) -> str:
    """A string as SQL writes it."""
    return "'" + str(text).replace("'", "''") + "'"


def literals(paths: list[Path]) -> str:
    """One path, or a list of them, as SQL writes it."""
    quoted = [literal(path) for path in paths]
    return quoted[0] if len(quoted) == 1 else f"[{', '.join(quoted)}]"


@dataclass
class _Bad:
    """What could not be read of a file."""

    count: int = 0
    quoted: list[str] = field(default_factory=list)  # the first few: where, what, why
    foreign: bool = False  # bytes that are no UTF-8

    def add(self, path: Path, line: int, text: str, why: str) -> None:
        self.count += 1
        self.foreign |= "utf-8" in why.lower()
        if len(self.quoted) < _QUOTED:
            shown = text.strip()[:_SHOWN]
            self.quoted.append(f"{path.name} line {line:,}: {why}: {shown!r}")


def _lines(path: Path) -> Iterator[bytes]:
    """The lines of a file, decompressed by its suffix."""
    try:
        with io.BufferedReader(pa.input_stream(str(path), compression="detect")) as stream:
            yield from stream
    except OSError as error:
        raise FindRecError(f"{path} cannot be read: {error}. Fetch it again") from None


def _object_of(line: bytes, loose: bool) -> dict[str, object]:
    """The object in a line; `ValueError` says why there is none."""
    try:
        text = line.decode()
    except UnicodeDecodeError as error:
        raise ValueError(f"not UTF-8 ({error.reason} at byte {error.start})") from None
    try:
        found = json.loads(text)
    except (json.JSONDecodeError, RecursionError) as error:
        if not loose:
            raise ValueError(f"no JSON ({error})") from None
        try:
            found = ast.literal_eval(text.strip())
        except (ValueError, SyntaxError, MemoryError, RecursionError):
            raise ValueError("neither JSON nor a Python literal") from None
    if not isinstance(found, dict):
        raise ValueError("no object")
    return found


def _pairs(columns: dict[str, str]) -> str:
    return "{" + ", ".join(f"{literal(name)}: {literal(kind)}" for name, kind in columns.items()) + "}"


class SourceTables:
    """Makes the tables of a recipe's files in `db`; `scratch` is a folder to work in.

    `bad_rows` counts what was left out of all files. Raises `FindRecError` for a file with more than the
    share `max_bad_rows` of bad rows, or one that is not of its format.
    """

    def __init__(
        self, db: duckdb.DuckDBPyConnection, scratch: Path, recipe: str, max_bad_rows: float
    ) -> None:
        self._db, self._scratch = db, scratch
        self._recipe, self._max_bad_rows = recipe, max_bad_rows
        self.bad_rows = 0

    def add(self, name: str, file: SourceFile, paths: list[Path]) -> str:
        """Read one file (or all that its glob found) and return what stands for it in SQL."""
        if file.format is None:
            return literals(paths)
        table = f'"file {name}"'
        readers = {
            "csv": self._separated,
            "tsv": self._separated,
            "recbole": self._recbole,
            "jsonl": self._json,
            "loose_json": self._json,
            "sequences": self._sequences,
            "parquet": self._parquet,
        }
        try:
            bad = readers[file.format](table, file, paths)
            row = self._db.execute(f"SELECT count(*) FROM {table}").fetchone()
        except duckdb.OutOfMemoryException:
            raise
        except duckdb.Error as error:
            where = ", ".join(str(path) for path in paths[:3])
            hint = "" if file.encoding else _foreign_hint(str(error).splitlines()[0])
            raise FindRecError(
                f"recipe {self._recipe}: file {name!r} ({where}) cannot be read as {file.format}: "
                f"{str(error).splitlines()[0]}{hint}"
            ) from None
        self._judge(name, file, bad, int(row[0]) if row else 0)
        return table

    def _judge(self, name: str, file: SourceFile, bad: _Bad, good: int) -> None:
        if not bad.count:
            return
        share = bad.count / (bad.count + good)
        told = (
            f"recipe {self._recipe}: {bad.count:,} of {bad.count + good:,} rows of file {name!r} cannot be "
            f"read ({'; '.join(bad.quoted)})"
        )
        if share > self._max_bad_rows:
            mend = ""
            if bad.foreign:
                is_json = file.format in ("jsonl", "loose_json")
                mend = "convert the file to UTF-8, " if is_json else "give its `encoding` (such as latin-1), "
            raise FindRecError(
                f"{told}. That is a share of {share:.2g}, and the recipe's max_bad_rows allows "
                f"{self._max_bad_rows:g}: {mend}mend the file, say its `columns` and types, or raise "
                "max_bad_rows"
            )
        say(f"{told}: left out")
        self.bad_rows += bad.count

    def _separated(self, table: str, file: SourceFile, paths: list[Path]) -> _Bad:
        options = ["header=true"] if file.header is not False else ["header=false"]
        options.append("delim='\\t'" if file.format == "tsv" else "delim=','")
        options += ["quote='\"'", "escape='\"'"]
        if file.columns:
            key = "types" if file.header is not False else "columns"
            options.append(f"{key}={_pairs(file.columns)}")
        if file.header is False:
            options.append("auto_detect=false")
        return self._read_csv(table, file, paths, options)

    def _recbole(self, table: str, file: SourceFile, paths: list[Path]) -> _Bad:
        header = next(_lines(paths[0]), b"").decode(errors="replace").rstrip("\r\n").split("\t")
        columns = {}
        for entry in header:
            name, _, kind = entry.partition(":")
            if kind not in _RECBOLE:
                raise FindRecError(
                    f"recipe {self._recipe}: {paths[0]} has no RecBole header: {entry[:_SHOWN]!r} is no "
                    f"name:type with a type of {', '.join(_RECBOLE)}, separated by tabs"
                )
            columns[name] = _RECBOLE[kind]
        options = ["header=false", "skip=1", "auto_detect=false", "delim='\\t'", "quote=''", "escape=''"]
        return self._read_csv(table, file, paths, [*options, f"columns={_pairs(columns)}"])

    def _read_csv(self, table: str, file: SourceFile, paths: list[Path], options: list[str]) -> _Bad:
        options = [*options, "store_rejects=true", f"max_line_size={_LONGEST_LINE}", "filename=false"]
        if file.encoding:
            options.append(f"encoding={literal(file.encoding)}")
        for kind in ("errors", "scans"):
            self._db.execute(f"DROP TABLE IF EXISTS reject_{kind}")
        execute(
            self._db,
            f"read {paths[0].name}",
            f"CREATE TABLE {table} AS SELECT * FROM read_csv({literals(paths)}, {', '.join(options)})",
        )
        rows = "FROM (SELECT DISTINCT ON (scan_id, file_id, byte_position) * FROM reject_errors)"
        found = self._db.execute(f"SELECT count(*) {rows}").fetchone()
        count = int(found[0]) if found else 0
        bad = _Bad(count)
        shown = self._db.execute(
            f"SELECT file_path, line, csv_line, error_message, error_type {rows} JOIN reject_scans "
            f"USING (scan_id, file_id) ORDER BY file_path, line LIMIT {_QUOTED}"
        ).fetchall()
        for path, line, text, why, kind in shown:
            why = "not UTF-8" if kind == "INVALID ENCODING" else str(why).splitlines()[0]
            bad.add(Path(path), int(line), str(text or ""), why)
        bad.count = count
        return bad

    def _json(self, table: str, file: SourceFile, paths: list[Path]) -> _Bad:
        loose = file.format == "loose_json"
        bad = _Bad()
        if loose:
            paths = [self._strict(path, number, bad) for number, path in enumerate(paths)]
        columns = f", columns={_pairs(file.columns)}" if file.columns else ", sample_size=-1"
        execute(
            self._db,
            f"read {paths[0].name}",
            f"CREATE TABLE {table} AS SELECT * FROM read_json({literals(paths)}, format='newline_delimited', "
            f"records=true, ignore_errors=true, maximum_object_size={_LONGEST_LINE}{columns})",
        )
        names = [row[0] for row in self._db.execute(f"DESCRIBE {table}").fetchall()]
        nothing = " AND ".join(f'"{name}" IS NULL' for name in names)
        found = self._db.execute(f"SELECT count(*) FROM {table} WHERE {nothing}").fetchone()
        if found and found[0]:  # DuckDB does not say where: read again, until enough are found
            unread = bad.count + int(found[0])
            for path in paths:
                for number, line in enumerate(_lines(path), 1):
                    if bad.count >= _QUOTED:
                        break
                    try:
                        if line.strip() and not set(_object_of(line, loose=False)) & set(names):
                            raise ValueError(f"none of the fields {', '.join(names)}")
                    except ValueError as error:
                        bad.add(path, number, line.decode(errors="replace"), str(error))
            bad.count = unread
            self._db.execute(f"DELETE FROM {table} WHERE {nothing}")
        return bad

    def _strict(self, path: Path, number: int, bad: _Bad) -> Path:
        """The objects of a loose file as JSON lines."""
        target = self._scratch / f"{number}-{path.name}.jsonl"
        with (
            target.open("w", encoding="utf-8") as out,
            progress(f"read {path.name}", unit="bytes", after_s=TOLD_AFTER_S) as bar,
        ):
            unshown = 0
            for line_number, line in enumerate(_lines(path), 1):
                if (unshown := unshown + len(line)) > 1 << 20:
                    bar.advance(unshown)
                    unshown = 0
                if not line.strip():
                    continue
                try:
                    out.write(json.dumps(_object_of(line, loose=True), allow_nan=False) + "\n")
                except (ValueError, TypeError) as error:  # TypeError: a set or bytes, which JSON has not
                    bad.add(path, line_number, line.decode(errors="replace"), str(error))
        return target

    def _sequences(self, table: str, file: SourceFile, paths: list[Path]) -> _Bad:
        lines = '"lines of a file"'
        bad = self._read_csv(
            lines,
            file,
            paths,
            [
                "header=false",
                "auto_detect=false",
                "strict_mode=false",
                "columns={'line': 'VARCHAR'}",
                *_WHOLE,
            ],
        )
        words = f"(SELECT string_split_regex(trim(line, ' \t\r,'), '[\\s,]+') AS word FROM {lines})"
        twice = self._db.execute(
            f"SELECT word[1] FROM {words} WHERE word[1] IS NOT NULL GROUP BY 1 HAVING count(*) > 1 LIMIT 1"
        ).fetchone()
        if twice:
            raise FindRecError(
                f"recipe {self._recipe}: {paths[0]} has several lines of user {twice[0]!r}: a sequence file "
                "has one line a user (`user item item ...`), oldest first. One `user item` pair a line is "
                "read by SQL: see datasets/sequence-files.md"
            )
        execute(
            self._db,
            f"cut {paths[0].name} into events",
            f'CREATE TABLE {table} AS SELECT word[1] AS "user", unnest(word[2:]) AS item, '
            f"CAST(unnest(range(1, len(word))) AS BIGINT) AS timestamp FROM {words} WHERE len(word) > 1",
        )
        alone = f"FROM (SELECT row_number() OVER () AS number, line FROM {lines}) WHERE trim(line) != '' AND "
        alone += "NOT regexp_matches(trim(line, ' \t\r,'), '[\\s,]')"
        for number, line in self._db.execute(f"SELECT number, line {alone} ORDER BY number").fetchall():
            bad.add(paths[0], int(number), line, "a user without items")
        self._db.execute(f"DROP TABLE {lines}")
        return bad

    def _parquet(self, table: str, file: SourceFile, paths: list[Path]) -> _Bad:
        self._db.execute(f"CREATE VIEW {table} AS SELECT * FROM read_parquet({literals(paths)})")
        return _Bad()


def _foreign_hint(told: str) -> str:
    """What to do where DuckDB met bytes that are no UTF-8."""
    foreign = "utf-8" in told.lower() or "unicode" in told.lower()
    return " (text that is not UTF-8: say its `encoding`, such as latin-1)" if foreign else ""
