"""Output of `findrec leaderboard`: tables for the terminal, and NAME.md, NAME.json and NAME.html."""

from __future__ import annotations

import json
import re
import shlex
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import yaml
from rich.table import Table
from rich.text import Text

from findrec import __version__
from findrec.errors import FindRecError
from findrec.evaluation.display.page import write_page
from findrec.evaluation.leaderboard.config import Leaderboard, folder_name
from findrec.evaluation.leaderboard.row_files import write_row_files
from findrec.evaluation.leaderboard.sheets import Sheet, notes_of, published_note, sheets_of, title_of
from findrec.evaluation.leaderboard.table import DataTable
from findrec.evaluation.metrics.significance import LEVEL
from findrec.files import replacing
from findrec.progress import Console
from findrec.text import redacted

Files = Mapping[tuple[str, str], str]  # configuration files by the labels of data set and row


def file_stem(leaderboard: Leaderboard) -> str:
    """The name of the files without their ending; with `only` it names the rows, so that none is replaced."""
    return "-".join([leaderboard.config.name, *(folder_name(row) for row in leaderboard.only)])


def command_line(file: str, leaderboard: Leaderboard) -> str:
    """The command that makes the same tables, without options that change no results."""
    only = [word for row in leaderboard.only for word in ("--only", row)]
    return redacted(shlex.join(["findrec", "leaderboard", file, *leaderboard.overrides, *only]))


def print_leaderboard(leaderboard: Leaderboard, tables: Sequence[DataTable]) -> None:
    """Print the tables to standard output."""
    console = Console(width=None if Console().is_terminal else 180)
    for table in tables:
        for sheet in sheets_of(leaderboard, table):
            shown = Table(title=sheet.title, title_justify="left")
            for number, name in enumerate(sheet.header):
                shown.add_column(Text(name), justify="right" if number else "left")
            for row in sheet.rows:
                shown.add_row(*(Text(cell) for cell in (title_of(row), *row.cells)))
            console.print(shown)
        for note in notes_of(leaderboard, table):
            console.print(note, markup=False, highlight=False, soft_wrap=True)


def write_leaderboard(
    folder: Path, leaderboard: Leaderboard, tables: Sequence[DataTable], command: str
) -> list[Path]:
    """Write the tables as Markdown, JSON and a page, and the configuration of each row; returns the tables.

    Equal results give equal bytes but for the cost of training: the last sections of the Markdown file and
    of the page, and the last key of the JSON file. Raises `FindRecError` if the files cannot be written.
    """
    stem = file_stem(leaderboard)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        files = write_row_files(folder, stem, leaderboard)
        texts = {
            folder / f"{stem}.md": "\n".join(_markdown(leaderboard, tables, command, files)) + "\n",
            folder / f"{stem}.json": json.dumps(
                _tree(leaderboard, tables, command, files), indent=1, allow_nan=False
            )
            + "\n",
        }
        for path, text in texts.items():
            with replacing(path) as part:
                part.write_text(text, encoding="utf-8")
        page = _write_page(folder / f"{stem}.html", leaderboard, tables, command, files)
    except OSError as error:
        raise FindRecError(
            f"cannot write the tables to {folder}: {error.strerror or error}. Choose another folder with "
            "--out; nothing is trained again"
        ) from error
    return [*texts, page]


def _tree(
    leaderboard: Leaderboard, tables: Sequence[DataTable], command: str, files: Files
) -> dict[str, Any]:
    trees, costs = [], {}
    for table in tables:
        tree = asdict(table)
        costs[table.data] = {line["label"]: line.pop("costs") for line in tree["lines"] if line["trained"]}
        for line in tree["lines"]:
            line.pop("costs", None)
            line["config"] = files.get((table.data, line["label"])) if line["trained"] else None
        tree["published"] = [one.model_dump(mode="json") for one in table.published]
        trees.append(tree)
    return {
        "name": leaderboard.config.name,
        "command": command,
        "file": redacted(leaderboard.source),
        "shared": yaml.safe_load(_shared(leaderboard)),
        "version": __version__,
        "seeds": leaderboard.config.seeds,
        "reference": leaderboard.config.reference,
        "level": LEVEL,
        "tables": trees,
        "costs": costs,
    }


def _shared(leaderboard: Leaderboard) -> str:
    return redacted(yaml.safe_dump(leaderboard.shared, sort_keys=False)).rstrip()


def _markdown(
    leaderboard: Leaderboard, tables: Sequence[DataTable], command: str, files: Files
) -> Iterator[str]:
    source = redacted(leaderboard.source).rstrip()
    fence = "`" * max(3, 1 + max((len(run) for run in re.findall("`+", source)), default=0))
    yield f"# {leaderboard.config.name}"
    yield ""
    yield f"Made by FindRec {__version__} with the command"
    yield from ("", f"{fence}sh", command, fence, "", "from the file", "")
    yield from (f"{fence}yaml", source, fence, "")
    yield "What all rows share, with the keys of `config`, of `budget` and of the command line:"
    yield from ("", "```yaml", _shared(leaderboard), "```", "")
    yield f"Seeds: {', '.join(map(str, leaderboard.config.seeds))}."
    for table in tables:
        yield f"Data of {table.data}: {table.recipe}, events sha256 `{table.events_sha256}`."
    costs = []
    for table in tables:
        for sheet in sheets_of(leaderboard, table):
            section = ["", f"## {sheet.title}", "", *_lines(sheet, table.data, files)]
            if sheet.is_cost:
                costs += section
            else:
                yield from section
        yield ""
        yield from (f"* {note}" for note in notes_of(leaderboard, table))
    yield from costs


def _lines(sheet: Sheet, data: str, files: Files) -> Iterator[str]:
    """A Markdown table."""
    yield f"| {' | '.join(map(_escaped, sheet.header))} |"
    yield f"| {' | '.join(['---', *['---:'] * (len(sheet.header) - 1)])} |"
    for row in sheet.rows:
        label = _escaped(title_of(row))
        file = files.get((data, row.label)) if row.kind == "trained" else None
        first = label if file is None else f"[{label}]({file})"
        yield f"| {' | '.join([first, *map(_escaped, row.cells)])} |"


def _escaped(cell: str) -> str:
    return cell.replace("|", r"\|")


def _write_page(
    path: Path, leaderboard: Leaderboard, tables: Sequence[DataTable], command: str, files: Files
) -> Path:
    shown = [
        {
            "data": table.data,
            "recipe": table.recipe,
            "sha256": table.events_sha256,
            "sheets": [_page_sheet(sheet, table, files) for sheet in sheets_of(leaderboard, table)],
            "notes": list(notes_of(leaderboard, table)),
        }
        for table in tables
    ]
    return write_page(
        path,
        "leaderboard/leaderboard.html.j2",
        name=leaderboard.config.name,
        version=__version__,
        command=command,
        seeds=", ".join(map(str, leaderboard.config.seeds)),
        tables=shown,
        source=redacted(leaderboard.source).rstrip(),
        shared=_shared(leaderboard),
    )


def _page_sheet(sheet: Sheet, table: DataTable, files: Files) -> dict[str, Any]:
    published = {one.name: one for one in table.published}
    rows = []
    for row in sheet.rows:
        result = published.get(row.label) if row.kind == "published" else None
        rows.append(
            {
                "label": row.label,
                "kind": row.kind,
                "file": files.get((table.data, row.label)) if row.kind == "trained" else None,
                "comparable": result is None or result.comparable,
                "source": "" if result is None else published_note(result),
                "cells": [
                    {"text": text, "best": number in row.significant} for number, text in enumerate(row.cells)
                ],
            }
        )
    return {"title": sheet.title, "header": sheet.header, "rows": rows}
