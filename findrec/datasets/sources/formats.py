"""Load raw files into DuckDB tables by format; bad rows are counted, quoted and skipped.

A file with a `format` in the recipe becomes a table to which the SQL refers as `{name}`; without one the SQL
reads the file itself. Compressed files (`.gz`, `.zst`) are read directly. Too many bad rows are an error.

* `csv`, `tsv`: a header line unless `header: false`; then `columns` names all columns and their SQL types.
  Fields of a csv can be in double quotes, those of a tsv cannot; `quote` and `escape` change this.
* `jsonl`: one JSON object per line. `columns` selects fields and sets their types.
* `loose_json`: the same with Python literals (`{'asin': ...}`), the format of the Amazon 2014 metadata.
* `parquet`.
* `sequences`: `user item item ...` a line, oldest first, separated by blanks, tabs or commas. The table has
  user, item and timestamp, which is the item's position from 1 on: such files only store the order.
* `webdataset`: tars with one sample per user (`findrec.datasets.sources.webdataset_format`). Bad samples are
  errors. `columns` selects fields and sets their types.
* `recbole`: atomic files, tab-separated, with a header of `name:type`; columns have the bare name.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Iterator
from contextlib import contextmanager
from pathlib import Path

import duckdb

from findrec.datasets.sources.bad_rows import BadRows, explain
from findrec.datasets.sources.duckdb_engine import SQL_ERRORS, execute, fetch_value, identifier, literals
from findrec.datasets.sources.json_lines import JsonTable
from findrec.datasets.sources.recipe import PLACEHOLDER, SourceFile
from findrec.datasets.sources.separated import WHOLE_LINES, OwnCsvTable, SeparatedTable, read_csv
from findrec.datasets.sources.webdataset_format import read_webdataset
from findrec.errors import FindRecError
from findrec.progress import warn

# `read_csv({name}` of the SQL with options without parentheses
_OWN_CSV = re.compile(r"\bread_csv(?:_auto)?\s*\(\s*\{([a-z_]\w*)\}\s*(?:,([^()]*))?\)", re.IGNORECASE)
_BARE = re.compile(r"\b(FROM|JOIN)\s+\{([a-z_]\w*)\}", re.IGNORECASE)
_TYPED = re.compile(
    r"\b(types|dtypes|column_types|columns|names|column_names|all_varchar|auto_detect)\b", re.I
)
_UNREADABLE = (".zip", ".xz", ".bz2", ".7z", ".rar", ".lz4")


class SourceTables:
    """Creates tables of a recipe's files in the database `db`; `scratch` is a folder for temporary files.

    Files are first declared, which finds their columns, and then loaded. `bad_rows` counts the skipped rows
    of all files. Raises `FindRecError` for a file with a larger share of bad rows than `max_bad_rows`, or one
    that does not have the stated format.
    """

    def __init__(
        self, db: duckdb.DuckDBPyConnection, scratch: Path, recipe: str, max_bad_rows: float
    ) -> None:
        self._db, self._scratch = db, scratch
        self._recipe, self._max_bad_rows = recipe, max_bad_rows
        self._files: dict[str, tuple[SourceFile, list[Path]]] = {}
        self._tables: dict[str, SeparatedTable | JsonTable | OwnCsvTable] = {}
        self.bad_rows = 0

    def declare(self, name: str, file: SourceFile, paths: list[Path]) -> None:
        """Find the columns of a file, or of all files of its glob."""
        self._files[name] = (file, paths)
        odd = [path for path in paths if path.suffix.lower() in _UNREADABLE]
        if odd and file.format != "webdataset":
            raise FindRecError(
                f"recipe {self._recipe}: file {name!r} is {odd[0]}, which cannot be read as it is: unpack it "
                "or pack it as .gz or .zst. For a file in a .zip or .tar archive, `path` is the archive and "
                "`member` the file"
            )
        with self._reported(name):
            if file.format in ("csv", "tsv", "recbole"):
                self._tables[name] = SeparatedTable(self._db, file, paths, self._recipe)
            elif file.format in ("jsonl", "loose_json"):
                self._tables[name] = JsonTable(self._db, file, paths, self._scratch, self._recipe)
            elif file.format == "sequences":
                self._judge(name, self._sequences(_table(name), file, paths))
            elif file.format == "webdataset":
                read_webdataset(self._db, _table(name), file.columns, paths, self._scratch, self._recipe)
            elif file.format == "parquet":
                self._db.execute(
                    f"CREATE VIEW {_table(name)} AS SELECT * FROM read_parquet({literals(paths)})"
                )

    def load(self, ids: Collection[str] = (), texts: Collection[str] = ()) -> None:
        """Create the tables of all files. Columns named in `ids` or `texts` are read as they are written."""
        for name, table in self._tables.items():
            with self._reported(name):
                columns = ids if isinstance(table, JsonTable) else {*ids, *texts}
                self._judge(name, table.load(_table(name), columns))

    @contextmanager
    def _reported(self, name: str) -> Iterator[None]:
        """Turn errors of DuckDB into a `FindRecError` about the file."""
        file, paths = self._files[name.partition(" ")[0]]
        try:
            yield
        except duckdb.OutOfMemoryException:
            raise
        except SQL_ERRORS as error:
            why = explain(error)
            hint = "" if file.encoding else _foreign_hint(why)
            if file.format is None:
                hint += ". With `format: csv` of the file, bad rows are counted and skipped"
            where = ", ".join(str(path) for path in paths[:3])
            raise FindRecError(
                f"recipe {self._recipe}: file {name.partition(' ')[0]!r} ({where}) cannot be read as "
                f"{file.format or 'csv'}: {why}{hint}"
            ) from None

    def changeable(self) -> list[str]:
        """Columns with a type that DuckDB guesses from their values, which can be read as written instead."""
        return list(dict.fromkeys(name for table in self._tables.values() for name in table.text_type))

    def fill(self, sql: str, text: Collection[str] | None = None) -> str:
        """Replace the placeholders of an SQL query by the tables and paths of the files.

        With `text`, the tables are empty and only have the columns of the files; those in `text` have the
        type by which they are read as written.
        """

        def own(match: re.Match[str]) -> str:
            name, options = match[1], (match[2] or "").strip()
            if self._files[name][0].format is not None or _TYPED.search(options):
                return match[0]
            return self._own_csv(name, options, text)

        def bare(match: re.Match[str]) -> str:
            word, name = match[1], match[2]
            file, paths = self._files[name]
            is_text = all(re.search(r"\.(csv|tsv)\b", path.name) for path in paths)
            return f"{word} {self._own_csv(name, '', text)}" if file.format is None and is_text else match[0]

        def table(match: re.Match[str]) -> str:
            name = match[1]
            if self._files[name][0].format is None:
                return literals(self._files[name][1])
            return self._filled(name, text)

        return PLACEHOLDER.sub(table, _BARE.sub(bare, _OWN_CSV.sub(own, sql))).strip().rstrip(";")

    def _own_csv(self, name: str, options: str, text: Collection[str] | None) -> str:
        """The SQL of a table that the SQL reads itself."""
        key = f"{name} {options}"
        if key not in self._tables:
            self._tables[key] = own = OwnCsvTable(self._db, self._files[name][1], options)
            if text is None:
                self._judge(key, own.load(_table(key), ()))
        return self._filled(key, text)

    def _filled(self, name: str, text: Collection[str] | None) -> str:
        """The SQL of a table: its name, or with `text` that of an empty one."""
        if text is None or name not in self._tables:
            return _table(name)
        reader = self._tables[name]
        return _empty(reader.types | {n: t for n, t in reader.text_type.items() if n in text})

    def _judge(self, name: str, bad: BadRows) -> None:
        """Count bad rows; `FindRecError` if they are too many."""
        if not bad.count:
            return
        file_name = name.partition(" ")[0]
        good = int(fetch_value(self._db, f"SELECT count(*) FROM {_table(name)}"))
        share = bad.count / (bad.count + good)
        message = (
            f"recipe {self._recipe}: {bad.count:,} of {bad.count + good:,} rows of file {file_name!r} cannot "
            f"be read ({'; '.join(bad.quoted)})"
        )
        if share > self._max_bad_rows:
            hint = ""
            if bad.foreign:
                is_json = self._files[file_name][0].format in ("jsonl", "loose_json")
                hint = "convert the file to UTF-8, " if is_json else "set its `encoding` (such as latin-1), "
            if bad.quotes:
                hint += "set `quote: ''` (in read_csv: quote='') if quotes are plain characters, "
            raise FindRecError(
                f"{message}. That is a share of {share:.2g}, and the recipe's max_bad_rows allows "
                f"{self._max_bad_rows:g}: {hint}repair the file, set its `columns` and types, or raise "
                "max_bad_rows"
            )
        warn(f"{message}: skipped")
        self.bad_rows += bad.count

    def _sequences(self, table: str, file: SourceFile, paths: list[Path]) -> BadRows:
        raw = '"lines of a file"'
        encoding = [f"encoding='{file.encoding}'"] if file.encoding else []
        bad = read_csv(self._db, raw, paths, [*WHOLE_LINES, *encoding])
        words = f"(SELECT string_split_regex(trim(line, ' \t\r,'), '[\\s,]+') AS word FROM {raw})"
        duplicate = self._db.execute(
            f"SELECT word[1] FROM {words} WHERE word[1] IS NOT NULL GROUP BY 1 HAVING count(*) > 1 LIMIT 1"
        ).fetchone()
        if duplicate:
            raise FindRecError(
                f"recipe {self._recipe}: {paths[0]} has several lines of user {duplicate[0]!r}: a sequence "
                "file has one line per user (`user item item ...`), oldest item first. For files with one "
                "`user item` pair per line see datasets/sequence-files.md"
            )
        execute(
            self._db,
            f"split {paths[0].name} into events",
            f'CREATE TABLE {table} AS SELECT word[1] AS "user", unnest(word[2:]) AS item, '
            f"CAST(unnest(range(1, len(word))) AS BIGINT) AS timestamp FROM {words} WHERE len(word) > 1",
        )
        alone = f"FROM (SELECT row_number() OVER () AS number, line FROM {raw}) WHERE trim(line) != '' AND "
        alone += "NOT regexp_matches(trim(line, ' \t\r,'), '[\\s,]')"
        for number, line in self._db.execute(f"SELECT number, line {alone} ORDER BY number").fetchall():
            bad.add(paths[0], int(number), line, "a user without items")
        self._db.execute(f"DROP TABLE {raw}")
        return bad


def _table(name: str) -> str:
    return identifier(f"file {name}")


def _empty(types: dict[str, str]) -> str:
    """SQL for a table without rows."""
    columns = (f"CAST(NULL AS {kind}) AS {identifier(name)}" for name, kind in types.items())
    return f"(SELECT {', '.join(columns)} LIMIT 0)"


def _foreign_hint(message: str) -> str:
    """Hint for error messages of DuckDB about bytes that are not UTF-8."""
    foreign = "utf-8" in message.lower() or "unicode" in message.lower()
    return " (the text is not UTF-8: set its `encoding`, such as latin-1)" if foreign else ""
