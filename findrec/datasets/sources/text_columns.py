"""Find the columns of text files that the SQL selects as ids or texts, so that they are read as written.

DuckDB guesses the type of a column from its values: it reads 7.10 as the number 7.1, and 2020-1-2 as a date.
As an id or title such a value must stay as it is, whereas times and values are needed as numbers.
"""

from __future__ import annotations

from collections.abc import Iterable

import duckdb

from findrec.datasets.sources.duckdb_engine import SQL_ERRORS, describe
from findrec.datasets.sources.formats import SourceTables
from findrec.datasets.sources.times import INTEGERS
from findrec.errors import FindRecError

_IDS = {"events": ("user", "item"), "items": ("item",)}
_TEXTS = {"events": ("event",), "items": ("title", "text", "category", "image")}
_READ_AS_WRITTEN = ("VARCHAR", "JSON")


def text_columns(
    db: duckdb.DuckDBPyConnection, tables: SourceTables, queries: dict[str, str]
) -> tuple[frozenset[str], frozenset[str]]:
    """Columns of the files that the SQL selects as ids, and those that it selects as other texts.

    A column is one of them if the type of the result changes with its own.

    Args:
        db: The database of the tables.
        tables: The declared files.
        queries: SQL of `events` and `items`; the latter may be empty.
    """

    def selected(text: Iterable[str]) -> dict[tuple[str, str], str] | None:
        """Type of each column that the queries select; None if the columns `text` do not fit them."""
        found: dict[tuple[str, str], str] = {}
        for which, sql in queries.items():
            try:
                types = describe(db, tables.fill(sql, frozenset(text))) if sql.strip() else {}
            except SQL_ERRORS:
                return None
            found |= {(which, name): kind for name, kind in types.items()}
        return found

    plain = selected(())
    if plain is None:  # an error in the SQL, which is reported when it is run
        return frozenset(), frozenset()
    ids, texts = set(), set()
    for column in tables.changeable():
        types = selected([column]) or plain
        changed = {k for k, kind in types.items() if kind != plain.get(k) and kind in _READ_AS_WRITTEN}
        if any(name in _IDS[which] for which, name in changed):
            ids.add(column)
        elif any(name in _TEXTS[which] for which, name in changed):
            texts.add(column)
    if selected(ids | texts) is None:
        return frozenset(), frozenset()
    return frozenset(ids), frozenset(texts)


def check_id_types(recipe: str, which: str, types: dict[str, str]) -> None:
    """Raise `FindRecError` if a query selects ids that are neither text nor integers."""
    for name in _IDS[which]:
        kind = types[name].upper()
        if kind in ("VARCHAR", "BIGNUM", '"NULL"', *INTEGERS) or kind.startswith("ENUM"):
            continue
        raise FindRecError(
            f"recipe {recipe}: the {which} SQL selects `{name}` of type {kind}, but ids must be text or "
            "integers as the file has them: other types change them (7.10 becomes 7.1, and matches no 7.1 of "
            "another file). Read the column as text (a `format`, or types={'" + name + "': 'VARCHAR'} of "
            f"read_csv), or convert whole numbers that were stored as others: CAST({name} AS BIGINT)"
        )
