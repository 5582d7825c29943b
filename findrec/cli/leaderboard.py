"""Defines the command `findrec leaderboard`."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated

import typer

from findrec.errors import Preempted
from findrec.paths import resolve
from findrec.text import printable
from findrec.train_dist import EXIT_AGAIN


def leaderboard(
    table: Annotated[Path, typer.Argument(help="The file of the leaderboard (YAML): evaluation/README.md.")],
    overrides: Annotated[
        list[str] | None,
        typer.Argument(
            metavar="[key=value]...",
            help="Keys of the file, e.g. seeds=[0], or of the run configuration of all rows, e.g. "
            "training.epochs=3.",
        ),
    ] = None,
    out: Annotated[
        Path | None,
        typer.Option(help="Folder for NAME.md, NAME.json and NAME.html; default: that of the runs."),
    ] = None,
    jobs: Annotated[
        int,
        typer.Option(
            min=1,
            help="Runs trained at the same time, each a process that starts Ray for itself on all cores and "
            "GPUs of this machine (cluster.threads limits the cores). With RAY_ADDRESS or cluster.address "
            "they share that cluster, which needs room for all their workers.",
        ),
    ] = 1,
    only: Annotated[
        list[str] | None,
        typer.Option(
            metavar="LABEL",
            help="Train only this row and the reference, and compare them in a table of its own; may be "
            "repeated.",
        ),
    ] = None,
) -> None:
    """Train and evaluate a list of configurations, and compare them in one table with significance."""
    from findrec.evaluation.leaderboard.checks import check_leaderboard
    from findrec.evaluation.leaderboard.config import load_leaderboard
    from findrec.evaluation.leaderboard.display import command_line, print_leaderboard, write_leaderboard
    from findrec.evaluation.leaderboard.runs import train_runs
    from findrec.evaluation.leaderboard.table import make_tables

    loaded = load_leaderboard(table, overrides or (), tuple(dict.fromkeys(only or ())))
    try:
        checked = check_leaderboard(loaded)
        train_runs(loaded.runs, checked.folders, jobs)
        tables = make_tables(loaded, checked)
    except Preempted as ended:
        print(printable(f"stopped by SIGTERM: {ended}; the same command continues"), file=sys.stderr)
        raise typer.Exit(EXIT_AGAIN) from None
    except KeyboardInterrupt:
        print("interrupted: the same command continues from the last checkpoints", file=sys.stderr)
        raise typer.Exit(130) from None
    print_leaderboard(loaded, tables)
    folder = resolve(loaded.runs[0].config.runs).parent if out is None else out
    written = write_leaderboard(folder, loaded, tables, command_line(str(table), loaded))
    typer.echo(f"written: {', '.join(map(str, written))}")
