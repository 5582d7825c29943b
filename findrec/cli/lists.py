"""Defines the commands `findrec index` and `findrec recommend`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from findrec.paths import find_run

RUN_HELP = "A run folder, or the name of one below runs/."


def index_run(
    run: Annotated[str, typer.Argument(help=RUN_HELP)],
    factory: Annotated[
        list[str] | None,
        typer.Option(help="A FAISS factory string, may be repeated; default: Flat, IVF<n>,Flat and HNSW32."),
    ] = None,
    setting: Annotated[
        list[str] | None,
        typer.Option(help="e.g. nprobe=8 or efSearch=64, may be repeated; default: a range of each."),
    ] = None,
    k: Annotated[int, typer.Option("--k", "-k", min=1, help="Length of the lists.")] = 10,
    users: Annotated[int, typer.Option(min=1, help="Largest number of test users to query.")] = 2000,
    threads: Annotated[int | None, typer.Option(min=1, help="Default: the run's cluster.threads.")] = None,
    gpus: Annotated[
        str | None,
        typer.Option(help="none, replicate or shard; default: replicate if FAISS finds GPUs."),
    ] = None,
    json: Annotated[
        Path | None, typer.Option(help="Also write the figures to this file, as JSON lines.")
    ] = None,
) -> None:
    """Build indexes of a run's items and measure their recall and cost against exact search."""
    folder = find_run(run)
    from findrec.evaluation.index.curve import measure_indexes
    from findrec.evaluation.index.display import print_curve, write_curve

    curve = measure_indexes(
        folder, factory or (), settings=setting or (), k=k, users=users, threads=threads, gpus=gpus
    )
    print_curve(curve)
    typer.echo("written: " + ", ".join(str(path) for path in write_curve(folder, curve, json)))


def recommend(
    run: Annotated[str, typer.Argument(help=RUN_HELP)],
    user: Annotated[
        list[str] | None, typer.Option(help="Raw id of a user in the run's data, may be repeated.")
    ] = None,
    users: Annotated[
        Path | None, typer.Option(help="File of raw user ids (text, CSV, Parquet), or `all` users.")
    ] = None,
    users_column: Annotated[
        str | None, typer.Option(help="Column of the ids in --users; default: user, or the only one.")
    ] = None,
    k: Annotated[int, typer.Option("--k", "-k", min=1, help="Length of the lists.")] = 10,
    only: Annotated[
        list[str] | None,
        typer.Option(
            metavar="CONDITION",
            help="Only items with this value in a column of the item table, e.g. category=Comedy, or "
            "'price<20' (<, <=, >, >=, !=; in quotes). May be repeated: values of one column are "
            "alternatives, other conditions must all hold.",
        ),
    ] = None,
    items: Annotated[
        Path | None,
        typer.Option(help="Only items in this file of raw ids (text, CSV, Parquet), e.g. the stock."),
    ] = None,
    items_column: Annotated[
        str | None, typer.Option(help="Column of the ids in --items; default: item, or the only one.")
    ] = None,
    at: Annotated[
        str | None,
        typer.Option(
            metavar="TIME",
            help="Time of the request, Unix seconds or ISO 8601; later events and items are ignored. "
            "Default: each user's last event.",
        ),
    ] = None,
    index: Annotated[
        str | None, typer.Option(metavar="FACTORY", help="Use this saved index; default: score all items.")
    ] = None,
    out: Annotated[
        Path | None, typer.Option(help="Also write the lists to this file: .csv, .parquet or .jsonl.")
    ] = None,
) -> None:
    """Recommend items to users with the model of a run, from all items or an allow-list."""
    folder = find_run(run)
    from findrec.serving.display import SHOWN, check_ending, print_lists, write_lists
    from findrec.serving.recommend import recommend as make_lists
    from findrec.serving.recommend import users_of

    if out is not None:
        check_ending(out)
    stock = None if items is None else items.expanduser().resolve()
    chosen = users_of(folder, user or [], users, users_column)
    lists = make_lists(
        folder,
        chosen,
        k=k,
        only=only or (),
        items=stock,
        items_column=items_column,
        at=at,
        index=index,
        lenient=users is not None,
    )
    print_lists(lists if out is None else lists[:SHOWN])
    if out is not None:
        write_lists(out, lists)
        hidden = (
            f" ({len(lists):,} lists, of which the first {SHOWN} are shown)" if len(lists) > SHOWN else ""
        )
        typer.echo(f"written: {out}{hidden}")
