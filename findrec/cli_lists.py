"""The commands that make lists of recommendations: `findrec index` and `findrec recommend`."""

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
    users: Annotated[int, typer.Option(min=1, help="Test users asked for, at most.")] = 2000,
    threads: Annotated[int | None, typer.Option(min=1, help="Default: the run's cluster.threads.")] = None,
    gpus: Annotated[
        str | None,
        typer.Option(help="none, replicate or shard; default: replicate where FAISS finds GPUs."),
    ] = None,
    json: Annotated[Path | None, typer.Option(help="Write the figures, as JSON lines, here too.")] = None,
) -> None:
    """Build indexes of a run's items and measure what each finds and costs against exact search."""
    folder = find_run(run)
    from findrec.evaluation.index_curve import measure_indexes
    from findrec.evaluation.index_show import print_curve, write_curve

    curve = measure_indexes(
        folder, factory or (), settings=setting or (), k=k, users=users, threads=threads, gpus=gpus
    )
    print_curve(curve)
    typer.echo("written: " + ", ".join(str(path) for path in write_curve(folder, curve, json)))


def recommend(
    run: Annotated[str, typer.Argument(help=RUN_HELP)],
    user: Annotated[list[str], typer.Option(help="Raw id of a user in the run's data, may be repeated.")],
    k: Annotated[int, typer.Option("--k", "-k", min=1, help="Length of the lists.")] = 10,
    only: Annotated[
        list[str] | None,
        typer.Option(
            metavar="COLUMN=VALUE",
            help="Items with that value in items.parquet, e.g. category=Comedy; may "
            "be repeated: of one column either, of several all.",
        ),
    ] = None,
    items: Annotated[
        Path | None, typer.Option(help="Items in this file of raw ids (text, CSV, Parquet), e.g. the stock.")
    ] = None,
    at: Annotated[
        str | None,
        typer.Option(
            metavar="TIME",
            help="When they ask, s or ISO 8601: nothing later is known or shown. Default: at "
            "each user's last event.",
        ),
    ] = None,
    index: Annotated[
        str | None, typer.Option(metavar="FACTORY", help="Use this saved index; default: score all items.")
    ] = None,
    out: Annotated[Path | None, typer.Option(help="Write the lists here too: .parquet or .jsonl.")] = None,
) -> None:
    """List the items a run's model recommends to users, out of all items or of those allowed."""
    folder = find_run(run)
    from findrec.evaluation.recommend import recommend as make_lists
    from findrec.evaluation.recommend_show import check_ending, print_lists, write_lists

    if out is not None:
        check_ending(out)
    stock = None if items is None else items.expanduser().resolve()
    lists = make_lists(folder, user, k=k, only=only or (), items=stock, at=at, index=index)
    print_lists(lists)
    if out is not None:
        write_lists(out, lists)
        typer.echo(f"written: {out}")
