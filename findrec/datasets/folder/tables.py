"""Reads `items.parquet` and `users.parquet` of a data folder; damage of any kind is a `FindRecError`."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq

from findrec.datasets.folder.manifest import Manifest, repair_hint
from findrec.errors import FindRecError

ITEMS_FILE = "items.parquet"
USERS_FILE = "users.parquet"


@contextmanager
def reading(file: Path, manifest: Manifest) -> Iterator[None]:
    """Turn what fails when a file of the data folder is read into a `FindRecError`."""
    try:
        yield
    except FindRecError:
        raise
    except (pa.ArrowException, OSError, ValueError, LookupError, TypeError, OverflowError) as error:
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise FindRecError(f"{file} cannot be read ({reason}). {repair_hint(manifest.recipe)}") from None


def read_table(folder: Path, name: str, manifest: Manifest, columns: Sequence[str] | None = None) -> pa.Table:
    """Read `ITEMS_FILE` or `USERS_FILE`, or some of its columns; they have a row for each item or user."""
    file = folder / name
    rows, what = (manifest.num_items, "item") if name == ITEMS_FILE else (manifest.num_users, "user")
    with reading(file, manifest):
        table = pq.read_table(file, columns=None if columns is None else list(columns))
        table.validate(full=True)  # also that text is UTF-8, which is otherwise noticed much later
        if missing := [column for column in columns or () if column not in table.column_names]:
            raise ValueError(f"it has no column {missing[0]!r}")
    if table.num_rows != rows:
        raise FindRecError(
            f"{file} has {table.num_rows} rows, so it does not have the ids 1..{rows} in order: "
            f"manifest.json says {rows} {what}s. {repair_hint(manifest.recipe)}"
        )
    return table


def column_names(folder: Path, name: str, manifest: Manifest) -> list[str]:
    """The columns of a table."""
    with reading(folder / name, manifest):
        names: list[str] = pq.read_schema(folder / name).names
    return names
