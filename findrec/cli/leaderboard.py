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
            min=0,
            help="Runs trained at the same time, at most; 0: as many as there is room for. They share a Ray "
            "cluster: that of RAY_ADDRESS or cluster.address, else one on this machine. Each starts when its "
            "workers' GPUs, or as many cores as they have threads (cluster.threads), are free.",
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
    from findrec.cluster.side_by_side import shared_cluster
    from findrec.evaluation.leaderboard.checks import check_leaderboard
    from findrec.evaluation.leaderboard.config import load_leaderboard
    from findrec.evaluation.leaderboard.display import command_line, print_leaderboard, write_leaderboard
    from findrec.evaluation.leaderboard.runs import train_runs
    from findrec.evaluation.leaderboard.table import make_tables
    from findrec.tuning.rows import tune_rows

    loaded = load_leaderboard(table, overrides or (), tuple(dict.fromkeys(only or ())))
    command = command_line(str(table), loaded)
    try:
        checked = check_leaderboard(loaded)
        tuned = tune_rows(loaded, command)
        if tuned is not loaded:
            loaded, checked = tuned, check_leaderboard(tuned)  # sizes may be others
        train_runs(loaded.runs, checked.folders, jobs, shared_cluster)
        tables = make_tables(loaded, checked)
    except Preempted as ended:
        print(printable(f"stopped by SIGTERM: {ended}; the same command continues"), file=sys.stderr)
        raise typer.Exit(EXIT_AGAIN) from None
    except KeyboardInterrupt:
        print("interrupted: the same command continues from the last checkpoints", file=sys.stderr)
        raise typer.Exit(130) from None
    print_leaderboard(loaded, tables)
    folder = resolve(loaded.runs[0].config.runs).parent if out is None else out
    written = write_leaderboard(folder, loaded, tables, command)
    typer.echo(f"written: {', '.join(map(str, written))}")
