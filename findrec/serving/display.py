"""Output of recommendation lists: tables for the terminal, CSV and Parquet files, JSON lines."""

from __future__ import annotations

import csv
import json
from collections.abc import Iterator, Sequence
from pathlib import Path

import pyarrow.parquet as pq
from rich.table import Table
from rich.text import Text

from findrec.errors import FindRecError
from findrec.evaluation.inspect.display import plain, shorten
from findrec.files import replacing
from findrec.progress import Console
from findrec.serving.lists import POPULARITY, One, Recommended, as_table, json_value

SHOWN = 20  # lists printed if all are written to a file


def format_list(listed: One) -> Table:
    """A rich table of one list."""
    caption = None if listed.items else "empty: all items are seen or unavailable"
    if isinstance(listed, Recommended):
        title = f"user {plain(listed.user)}"
        if listed.ranked_by == POPULARITY:
            caption = "no known item in the history: the most popular items"
    else:
        title = f"similar to {plain(listed.item)}: {shorten(listed.title)}"
    table = Table(title=Text(title), caption=caption)
    table.add_column("rank", justify="right")
    table.add_column("item")
    table.add_column("title")
    for name in listed.more:
        table.add_column(Text(plain(name)))
    table.add_column("score", justify="right")
    rows = zip(listed.items, listed.titles, listed.scores, strict=True)
    for rank, (item, title, score) in enumerate(rows, start=1):
        more = (column[rank - 1] for column in listed.more.values())
        cells = [Text(shorten("" if one is None else str(one))) for one in more]
        table.add_row(str(rank), Text(plain(item)), Text(shorten(title)), *cells, f"{score:.4f}")
    return table


def print_lists(lists: Sequence[One]) -> None:
    """Print the lists as tables to standard output."""
    console = Console(width=None if Console().is_terminal else 120)
    for listed in lists:
        console.print(format_list(listed))


def json_lines(lists: Sequence[One]) -> Iterator[str]:
    """One JSON object and line for each listed item, with the columns of `as_table`; NaN is null."""
    for row in as_table(lists).to_pylist():
        yield json.dumps({name: json_value(value) for name, value in row.items()}, allow_nan=False) + "\n"


def check_ending(path: Path) -> None:
    """Raise `FindRecError` for an unsupported file extension."""
    if path.suffix not in (".csv", ".parquet", ".jsonl"):
        raise FindRecError(f"{path}: lists are written as .csv, .parquet or .jsonl")


def write_lists(path: Path, lists: Sequence[One]) -> None:
    """Write lists with one row per listed item: user, time, rank, item, title, score, further columns.

    The file is `.csv`, `.parquet` or `.jsonl`, written in one rename. Raises `FindRecError` for another
    extension or if it cannot be written.
    """
    check_ending(path)
    table = as_table(lists)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with replacing(path) as part:
            if path.suffix == ".parquet":
                pq.write_table(table, part)
            elif path.suffix == ".jsonl":
                part.write_text("".join(json_lines(lists)), encoding="utf-8")
            else:
                with part.open("w", encoding="utf-8", newline="") as stream:
                    writer = csv.writer(stream, lineterminator="\n")
                    writer.writerow(table.column_names)
                    writer.writerows(row.values() for row in table.to_pylist())
    except OSError as error:
        raise FindRecError(f"cannot write {path}: {error.strerror or error}") from None
