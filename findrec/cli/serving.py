"""Defines the commands `findrec export` and `findrec serve`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from findrec.cli.lists import RUN_HELP, STORED_HELP
from findrec.errors import FindRecError
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


def serve(
    run: Annotated[str, typer.Argument(help=STORED_HELP)],
    host: Annotated[
        str, typer.Option(help="Address to listen on; 0.0.0.0 for all. There is no authentication.")
    ] = "127.0.0.1",
    port: Annotated[int, typer.Option(min=0, max=65535, help="0 chooses a free one.")] = 8000,
    state: Annotated[
        Path | None,
        typer.Option(help="SQLite file of appended events; default: serving/RUN.sqlite in FindRec's home."),
    ] = None,
    index: Annotated[
        str | None, typer.Option(metavar="FACTORY", help="Use this saved index; default: score all items.")
    ] = None,
    batch: Annotated[int, typer.Option(min=1, help="Largest number of lists of one pass.")] = 64,
    wait_ms: Annotated[
        float, typer.Option(min=0, help="How long a request waits for others to share its pass, in ms.")
    ] = 2.0,
    queue: Annotated[
        int, typer.Option(min=1, help="Lists that may wait; further requests get status 429.")
    ] = 1024,
    no_page: Annotated[
        bool,
        typer.Option("--no-page", help="Without the page and what it reads: items, users, histories."),
    ] = False,
) -> None:
    """Answer over HTTP: lists, similar items, appended events, metrics, and a page to try the model.

    findrec serve demo --port 8000
    """
    folder = find_run(run)
    try:
        from findrec.serving.http.app import Limits
        from findrec.serving.http.server import serve as run_server
    except ModuleNotFoundError as error:
        raise FindRecError(f"{error.name} is not installed: pip install 'findrec[serve]'") from None
    limits = Limits(batch=batch, wait_s=wait_ms / 1000, waiting=queue)
    path = None if state is None else state.expanduser().resolve()
    run_server(folder, host=host, port=port, state=path, index=index, limits=limits, page=not no_page)
