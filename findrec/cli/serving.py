"""Defines the command `findrec export`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from findrec.cli.lists import RUN_HELP
from findrec.paths import find_run


def export(
    run: Annotated[str, typer.Argument(help=RUN_HELP)],
    folder: Annotated[
        Path | None, typer.Argument(help="The folder to write; default: export in the run folder.")
    ] = None,
    users: Annotated[
        bool,
        typer.Option(
            "--users",
            help="Include the users' histories, which are personal data; without them the export answers for "
            "given histories.",
        ),
    ] = False,
    index: Annotated[
        list[str] | None,
        typer.Option(metavar="FACTORY", help="Include this saved index (findrec index); may be repeated."),
    ] = None,
    force: Annotated[bool, typer.Option("--force", help="Replace an earlier export.")] = False,
) -> None:
    """Write a folder with all that a trained model needs to answer: weights, items, vectors, model card.

    findrec export demo shop-model && findrec recommend shop-model --history 50,181
    """
    source = find_run(run)
    from findrec.serving.export.export import export_run

    target = None if folder is None else folder.expanduser().resolve()
    written = export_run(source, target, users=users, indexes=index or (), force=force)
    typer.echo(f"written: {written}")
