"""Output of `findrec leaderboard`: tables for the terminal, and the files NAME.md and NAME.json."""

from __future__ import annotations

import json
import re
import shlex
from collections.abc import Iterator, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import yaml
from rich.table import Table
from rich.text import Text

from findrec import __version__
from findrec.errors import FindRecError
from findrec.evaluation.compare.display import format_p, interval, signed
from findrec.evaluation.display.wording import format_number
from findrec.evaluation.leaderboard.config import Leaderboard, folder_name
from findrec.evaluation.leaderboard.table import COLD_K, DataTable, Value
from findrec.evaluation.metrics.significance import LEVEL, resamples_needed
from findrec.evaluation.suites.display import TITLES
from findrec.evaluation.suites.inputs import KINDS
from findrec.files import replacing
from findrec.progress import Console, format_seconds
from findrec.text import redacted
from findrec.training.checkpoints.validations import SELECTS

_NONE = "–"


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
        for title, header, rows in _sheets(leaderboard, table):
            shown = Table(title=title, title_justify="left")
            for number, name in enumerate(header):
                shown.add_column(Text(name), justify="right" if number else "left")
            for row in rows:
                shown.add_row(*(Text(cell) for cell in row))
            console.print(shown)
        for note in _notes(leaderboard, table):
            console.print(note, markup=False, highlight=False, soft_wrap=True)


def write_leaderboard(
    folder: Path, leaderboard: Leaderboard, tables: Sequence[DataTable], command: str
) -> list[Path]:
    """Write the tables as Markdown and JSON; returns the paths. Equal results give equal bytes.

    Only the last section of the Markdown file has times, those of the saved trainings. Raises `FindRecError`
    if the files cannot be written.
    """
    stem = file_stem(leaderboard)
    texts = {
        folder / f"{stem}.md": "\n".join(_markdown(leaderboard, tables, command)) + "\n",
        folder / f"{stem}.json": json.dumps(_tree(leaderboard, tables, command), indent=1, allow_nan=False)
        + "\n",
    }
    try:
        folder.mkdir(parents=True, exist_ok=True)
        for path, text in texts.items():
            with replacing(path) as part:
                part.write_text(text, encoding="utf-8")
    except OSError as error:
        raise FindRecError(
            f"cannot write the tables to {folder}: {error.strerror or error}. Choose another folder with "
            "--out; nothing is trained again"
        ) from error
    return list(texts)


def _tree(leaderboard: Leaderboard, tables: Sequence[DataTable], command: str) -> dict[str, Any]:
    trees = [asdict(table) for table in tables]
    for tree in trees:
        for line in tree["lines"]:
            del line["seconds"]
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
    }


def _markdown(leaderboard: Leaderboard, tables: Sequence[DataTable], command: str) -> Iterator[str]:
    source = redacted(leaderboard.source).rstrip()
    fence = "`" * max(3, 1 + max((len(run) for run in re.findall("`+", source)), default=0))
    yield f"# {leaderboard.config.name}"
    yield ""
    yield f"Made by FindRec {__version__} with the command"
    yield from ("", f"{fence}sh", command, fence, "", "from the file", "")
    yield from (f"{fence}yaml", source, fence, "")
    yield "What all rows share, with the keys of `config` and of the command line:"
    yield from ("", "```yaml", _shared(leaderboard), "```", "")
    yield f"Seeds: {', '.join(map(str, leaderboard.config.seeds))}."
    for table in tables:
        yield f"Data of {table.data}: {table.recipe}, events sha256 `{table.events_sha256}`."
    for table in tables:
        for title, header, rows in _sheets(leaderboard, table):
            yield from ("", f"## {title}", "", *_lines(header, rows))
        yield ""
        yield from (f"* {note}" for note in _notes(leaderboard, table))
    if timings := [row for table in tables for row in _timings(table)]:
        yield from ("", "## Training time", "")
        yield "Time in training steps, by the logs of the runs; it depends on the machine."
        yield from ("", *_lines(["data", "row", "mean", "each seed"], timings))


def _shared(leaderboard: Leaderboard) -> str:
    return redacted(yaml.safe_dump(leaderboard.shared, sort_keys=False)).rstrip()


def _timings(table: DataTable) -> Iterator[list[str]]:
    for line in table.lines:
        if line.seconds:
            each = [format_seconds(seconds) for seconds in line.seconds]
            mean = format_seconds(sum(line.seconds) / len(each))
            yield [table.data, line.label, mean, ", ".join(each)]


def _lines(header: Sequence[str], rows: Sequence[Sequence[str]]) -> Iterator[str]:
    """A Markdown table."""
    for cells in (header, ["---", *["---:"] * (len(header) - 1)], *rows):
        yield f"| {' | '.join(cell.replace('|', chr(92) + '|') for cell in cells)} |"


def _sheets(leaderboard: Leaderboard, table: DataTable) -> Iterator[tuple[str, list[str], list[list[str]]]]:
    """The title, header and cells of the table of a data set, then of its suites."""
    metrics = leaderboard.config.metrics
    header = ["row"]
    for metric in metrics:
        header += [metric, f"vs. {leaderboard.config.reference}", f"{100 * LEVEL:g} %", "p"]
    extra = {
        f"valid {SELECTS}": [_mean(line.valid) for line in table.lines],
        f"cold HR@{COLD_K}": [_mean(line.cold) for line in table.lines],
        "weights": [format_number(line.weights) for line in table.lines],
    }
    if not table.cold_cases:
        del extra[f"cold HR@{COLD_K}"]
    rows = []
    for number, line in enumerate(table.lines):
        cells = [line.label, *(cell for metric in metrics for cell in _measured(line.metrics[metric]))]
        rows.append(cells + [column[number] for column in extra.values()])
    yield table.data, [*header, *extra], rows
    if any(line.suites for line in table.lines):
        suites = leaderboard.config.suites
        columns = [(kind, level) for kind, levels in suites.items() for level in sorted(set(levels))]
        names = [f"{kind} {level:,}{'' if kind == 'length' else ' %'}" for kind, level in columns]
        rows = [
            [line.label, _mean(line.plain)]
            + [_mean(line.suites.get(kind, {}).get(level)) for kind, level in columns]
            for line in table.lines
        ]
        yield f"{table.data}, robustness: {table.suite_metric}", ["row", "as tested", *names], rows


def _measured(value: Value) -> list[str]:
    change = value.change
    if change is None:
        return [_mean(value), "", "", ""]
    star = "*" if change.real else ""
    return [
        _mean(value),
        signed(change.value) + star,
        interval(change.low, change.high, with_sign=True),
        format_p(change.p),
    ]


def _mean(value: Value | None) -> str:
    if value is None:
        return _NONE
    spread = "" if value.spread is None else f" ± {format_number(value.spread)}"
    return format_number(value.mean) + spread


def _notes(leaderboard: Leaderboard, table: DataTable) -> Iterator[str]:
    seeds = len(leaderboard.config.seeds)
    yield f"{table.protocol}; {table.users:,} users, {table.cases:,} cases"
    if seeds > 1:
        yield f"rows: mean ± standard deviation over {seeds} seeds; differences are of the users' means"
    else:
        yield "rows: of one seed, so the variation between seeds is not known"
    yield (
        f"differences, intervals and p: paired bootstrap over users, {table.resamples:,} resamples; p after "
        f"Holm's correction for {table.comparisons:,} comparison{'s' * (table.comparisons != 1)}; *: "
        f"p < {1 - LEVEL:.2g}. Intervals are not corrected, and variation between seeds is not part of them"
    )
    needed = resamples_needed(table.comparisons)
    if needed > table.resamples:
        yield f"NOTE: {table.resamples:,} resamples are too few for any difference to be significant"
    yield f"valid {SELECTS}: of the checkpoint that was tested, which is the best of its training"
    if table.cold_cases:
        yield (
            f"cold HR@{COLD_K}: share of hits among the first {COLD_K}, over the {table.cold_cases:,} cases "
            "whose target has no training event"
        )
    if any(line.suites for line in table.lines):
        used = {kind for line in table.lines for kind in line.suites}
        names = ", ".join(f"{kind}: {TITLES[kind].lower()}" for kind in KINDS if kind in used)
        yield f"robustness ({names}): {_NONE} where a line does not use what is altered"
