"""Lists for eyes and programs: tables for a terminal, a Parquet file, JSON lines."""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
from rich.console import Console
from rich.table import Table
from rich.text import Text

from findrec.errors import FindRecError
from findrec.evaluation.inspect_show import plain, shorten
from findrec.evaluation.recommend import Recommended


def format_list(found: Recommended) -> Table:
    """A rich table of one user's list."""
    caption = None if found.items else "nothing is left to show: all items are seen or not on offer"
    table = Table(title=Text(f"user {plain(found.user)}"), caption=caption)
    table.add_column("rank", justify="right")
    table.add_column("item")
    table.add_column("title")
    table.add_column("score", justify="right")
    rows = zip(found.items, found.titles, found.scores, strict=True)
    for rank, (item, title, score) in enumerate(rows, start=1):
        table.add_row(str(rank), Text(plain(item)), Text(shorten(title)), f"{score:.4f}")
    return table


def print_lists(lists: Sequence[Recommended]) -> None:
    """The tables on standard output."""
    console = Console(width=None if Console().is_terminal else 120)
    for found in lists:
        console.print(format_list(found))


def check_ending(path: Path) -> None:
    """Raise `FindRecError` for a file that lists cannot be written to."""
    if path.suffix not in (".parquet", ".jsonl"):
        raise FindRecError(f"{path}: lists are written as .parquet or .jsonl")


def write_lists(path: Path, lists: Sequence[Recommended]) -> None:
    """A line or row for each place of each list: user, time, rank, item, title, score.

    `.parquet` or `.jsonl`, in one rename; raises `FindRecError` for another ending and where it cannot be
    written.
    """
    check_ending(path)
    rows = [
        {"user": one.user, "time": one.time, "rank": rank, "item": item, "title": title, "score": score}
        for one in lists
        for rank, (item, title, score) in enumerate(
            zip(one.items, one.titles, one.scores, strict=True), start=1
        )
    ]
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        if path.suffix == ".jsonl":
            temporary.write_text("".join(f"{json.dumps(row)}\n" for row in rows), encoding="utf-8")
        else:
            kinds = {"user": pa.string(), "time": pa.int64(), "rank": pa.int64()}
            kinds |= {"item": pa.string(), "title": pa.string(), "score": pa.float64()}
            pq.write_table(pa.Table.from_pylist(rows, schema=pa.schema(kinds)), temporary)
        temporary.replace(path)
    except OSError as error:
        temporary.unlink(missing_ok=True)
        raise FindRecError(f"cannot write {path}: {error.strerror or error}") from None
