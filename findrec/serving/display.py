"""Output of recommendation lists: tables for the terminal, CSV and Parquet files, JSON lines."""

from __future__ import annotations

import csv
import json
from collections.abc import Sequence
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
from rich.table import Table
from rich.text import Text

from findrec.errors import FindRecError
from findrec.evaluation.inspect.display import plain, shorten
from findrec.files import replacing
from findrec.progress import Console
from findrec.serving.recommend import Recommended

SHOWN = 20  # lists printed if all are written to a file


def format_list(recommended: Recommended) -> Table:
    """A rich table of one user's list."""
    caption = None if recommended.items else "empty: all items are seen or unavailable"
    table = Table(title=Text(f"user {plain(recommended.user)}"), caption=caption)
    table.add_column("rank", justify="right")
    table.add_column("item")
    table.add_column("title")
    for name in recommended.more:
        table.add_column(Text(plain(name)))
    table.add_column("score", justify="right")
    rows = zip(recommended.items, recommended.titles, recommended.scores, strict=True)
    for rank, (item, title, score) in enumerate(rows, start=1):
        more = (column[rank - 1] for column in recommended.more.values())
        cells = [Text(shorten("" if one is None else str(one))) for one in more]
        table.add_row(str(rank), Text(plain(item)), Text(shorten(title)), *cells, f"{score:.4f}")
    return table


def print_lists(lists: Sequence[Recommended]) -> None:
    """Print the lists as tables to standard output."""
    console = Console(width=None if Console().is_terminal else 120)
    for recommended in lists:
        console.print(format_list(recommended))


def check_ending(path: Path) -> None:
    """Raise `FindRecError` for an unsupported file extension."""
    if path.suffix not in (".csv", ".parquet", ".jsonl"):
        raise FindRecError(f"{path}: lists are written as .csv, .parquet or .jsonl")


def write_lists(path: Path, lists: Sequence[Recommended]) -> None:
    """Write lists with one row per listed item: user, time, rank, item, title, score, further columns.

    The file is `.csv`, `.parquet` or `.jsonl`, written in one rename. Raises `FindRecError` for another
    extension or if it cannot be written.
    """
    check_ending(path)
    columns = {
        "user": pa.array([one.user for one in lists for _ in one.items], pa.string()),
        "time": pa.array([one.time for one in lists for _ in one.items], pa.int64()),
        "rank": pa.array([rank + 1 for one in lists for rank in range(len(one.items))], pa.int64()),
        "item": pa.array([item for one in lists for item in one.items], pa.string()),
        "title": pa.array([title for one in lists for title in one.titles], pa.string()),
        "score": pa.array([score for one in lists for score in one.scores], pa.float64()),
    }
    for name in dict.fromkeys(name for one in lists for name in one.more if name not in columns):
        columns[name] = pa.array([value for one in lists for value in one.more[name]])
    table = pa.table(columns)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with replacing(path) as part:
            if path.suffix == ".parquet":
                pq.write_table(table, part)
            elif path.suffix == ".jsonl":
                lines = (json.dumps(row, default=str) + "\n" for row in table.to_pylist())
                part.write_text("".join(lines), encoding="utf-8")
            else:
                with part.open("w", encoding="utf-8", newline="") as stream:
                    writer = csv.writer(stream, lineterminator="\n")
                    writer.writerow(table.column_names)
                    writer.writerows(row.values() for row in table.to_pylist())
    except OSError as error:
        raise FindRecError(f"cannot write {path}: {error.strerror or error}") from None
