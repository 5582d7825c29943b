"""Defines the commands `findrec index`, `findrec recommend` and `findrec similar`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from findrec.errors import FindRecError
from findrec.paths import find_run

RUN_HELP = "A run folder, or the name of one below runs/."
STORED_HELP = f"{RUN_HELP} Or an export of one."
JSON_HELP = "Print JSON lines, one for each listed item, instead of tables."


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
    run: Annotated[str, typer.Argument(help=STORED_HELP)],
    user: Annotated[
        list[str] | None, typer.Option(help="Raw id of a user in the run's data, may be repeated.")
    ] = None,
    users: Annotated[
        Path | None, typer.Option(help="File of raw user ids (text, CSV, Parquet), or `all` users.")
    ] = None,
    users_column: Annotated[
        str | None, typer.Option(help="Column of the ids in --users; default: user, or the only one.")
    ] = None,
    history: Annotated[
        list[str] | None,
        typer.Option(
            metavar="ITEM,ITEM...",
            help="Instead of users: the raw ids of a visitor's items, oldest first; may be repeated, one "
            "option a visitor.",
        ),
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
    as_json: Annotated[bool, typer.Option("--json", help=JSON_HELP)] = False,
) -> None:
    """Recommend items to users, or to visitors with a given history, from all items or an allow-list.

    findrec recommend demo --history 50,181,174 --only category=Drama
    """
    folder = find_run(run)
    from findrec.serving.display import check_ending
    from findrec.serving.recommender import Recommender
    from findrec.serving.users import users_of

    if out is not None:
        check_ending(out)
    if history and (user or users is not None):
        raise FindRecError("--history is given instead of --user and --users: leave one of them out")
    chosen = None if history else users_of(folder, user or [], users, users_column)
    lists = Recommender.load(folder, index).recommend(
        chosen,
        histories=[[item.strip() for item in one.split(",") if item.strip()] for one in history]
        if history
        else None,
        k=k,
        only=only or (),
        items=None if items is None else items.expanduser().resolve(),
        items_column=items_column,
        at=at,
        lenient=users is not None,
    )
    _show(lists, out, as_json)


def similar(
    run: Annotated[str, typer.Argument(help=STORED_HELP)],
    item: Annotated[list[str], typer.Argument(metavar="ITEM...", help="Raw ids of items.")],
    k: Annotated[int, typer.Option("--k", "-k", min=1, help="Length of the lists.")] = 10,
    only: Annotated[
        list[str] | None,
        typer.Option(metavar="CONDITION", help="Only items that satisfy it, as in findrec recommend."),
    ] = None,
    out: Annotated[
        Path | None, typer.Option(help="Also write the lists to this file: .csv, .parquet or .jsonl.")
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help=JSON_HELP)] = False,
) -> None:
    """List the items whose vectors are most similar to those of the given items.

    findrec similar demo 50 --k 5
    """
    folder = find_run(run)
    from findrec.serving.display import check_ending
    from findrec.serving.recommender import Recommender

    if out is not None:
        check_ending(out)
    _show(Recommender.load(folder).similar_items(item, k, only=only or ()), out, as_json)


def _show(lists: Any, out: Path | None, as_json: bool) -> None:
    """Print lists as tables, or all of them as JSON lines, and write them to a file if one is given."""
    from findrec.serving.display import SHOWN, json_lines, print_lists, write_lists

    if as_json:
        typer.echo("".join(json_lines(lists)), nl=False)
    else:
        print_lists(lists if out is None else lists[:SHOWN])
    if out is not None:
        write_lists(out, lists)
        hidden = (
            f" ({len(lists):,} lists, of which the first {SHOWN} are shown)"
            if len(lists) > SHOWN and not as_json
            else ""
        )
        typer.echo(f"written: {out}{hidden}", err=as_json)
