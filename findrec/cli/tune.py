"""Defines the command `findrec tune`."""

from __future__ import annotations

import shlex
import sys
from pathlib import Path
from typing import Annotated

import typer

from findrec.errors import Preempted
from findrec.text import printable, redacted
from findrec.train_dist import EXIT_AGAIN


def tune(
    config: Annotated[str, typer.Argument(help="Name or path of a run configuration, e.g. demo.")],
    overrides: Annotated[
        list[str] | None, typer.Argument(metavar="[dotted.key=value]...", help="e.g. training.epochs=10")
    ] = None,
    trials: Annotated[
        int,
        typer.Option(min=1, help="Trials in all, with earlier ones; a higher number adds to them."),
    ] = 30,
    space: Annotated[
        Path | None,
        typer.Option(help="Search space (YAML); default: that of the model (findrec/models/README.md)."),
    ] = None,
    fresh: Annotated[bool, typer.Option("--fresh", help="Delete earlier trials first.")] = False,
) -> None:
    """Search for better values of the keys of a configuration, and report which of them mattered.

    findrec tune shop --trials 30

    The same command continues after an interruption. The best configuration is written to best.yaml.
    """
    from findrec.config import load_config
    from findrec.tuning.report import print_summary, write_report
    from findrec.tuning.space import find_space
    from findrec.tuning.study import run_study

    loaded = load_config(config, overrides or ())
    searched = find_space(loaded, space)
    try:
        ended = run_study(loaded, searched, trials=trials, fresh=fresh)
    except Preempted as ended_early:
        print(printable(f"stopped by SIGTERM: {ended_early}; the same command continues"), file=sys.stderr)
        raise typer.Exit(EXIT_AGAIN) from None
    except KeyboardInterrupt:
        print("interrupted: the same command continues", file=sys.stderr)
        raise typer.Exit(130) from None
    options = ["--trials", str(trials), *([] if space is None else ["--space", str(space)])]
    command = redacted(shlex.join(["findrec", "tune", config, *(overrides or []), *options]))
    written = write_report(loaded, searched, ended, command)
    print_summary(searched, ended)
    typer.echo(f"written: {', '.join(map(str, written))}")
