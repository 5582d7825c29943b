"""Defines the `findrec` command line: data sets, runs, reports.

Heavy packages are imported inside the commands, so that `findrec --help` answers at once.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated

import typer

from findrec import __version__
from findrec.cli.config import config
from findrec.cli.leaderboard import leaderboard
from findrec.cli.lists import RUN_HELP, index_run, recommend, similar
from findrec.cli.serving import export, serve
from findrec.cli.tune import tune
from findrec.errors import FindRecError, system_error
from findrec.paths import drop_checkout_from_sys_path, find_data_folder, find_run, resolve
from findrec.text import printable

app = typer.Typer(
    no_args_is_help=True,
    context_settings={"help_option_names": ["-h", "--help"]},
    pretty_exceptions_enable=False,
)


DATA_HELP = "A data folder, its name below data/, or its recipe's file."


def _print_version(asked: bool) -> None:
    if asked:
        typer.echo(__version__)
        raise typer.Exit


@app.callback()
def options(
    version: Annotated[
        bool, typer.Option("--version", callback=_print_version, is_eager=True, help="Print the version.")
    ] = False,
) -> None:
    """Train and evaluate multimodal recommenders on very long histories."""


@app.command()
def prepare(
    recipe: Annotated[str, typer.Argument(help="Name or path of a recipe, e.g. ml-100k.")],
    folder: Annotated[str | None, typer.Option(help="Where to write; default: data/<recipe name>.")] = None,
    force: Annotated[bool, typer.Option("--force", help="Prepare it again even if it exists.")] = False,
    memory_gib: Annotated[
        float | None, typer.Option(help="Memory for DuckDB; default: FINDREC_MEMORY_GIB, or 3 at most.")
    ] = None,
    threads: Annotated[int | None, typer.Option(help="Default: FINDREC_THREADS, or all cores.")] = None,
    scratch: Annotated[
        Path | None,
        typer.Option(help="Folder for temporary files; default: FINDREC_SCRATCH, or beside the data folder."),
    ] = None,
    grow: Annotated[
        str | None, typer.Option(help="An earlier data folder: its items keep their ids, new ones follow.")
    ] = None,
) -> None:
    """Fetch a data set and write its data folder; returns at once if it already exists."""
    from findrec.config import DataConfig
    from findrec.datasets.folder.configured import data_folder_of
    from findrec.datasets.prepare.pipeline import prepare as make
    from findrec.datasets.sources.duckdb_engine import Limits
    from findrec.datasets.sources.recipe import load_recipe

    loaded = load_recipe(recipe)
    target = data_folder_of(DataConfig(recipe=recipe, folder=folder))  # the folder in which a run expects it
    parent = None if grow is None else find_data_folder(grow)
    make(loaded, target, force=force, limits=Limits.of(memory_gib, threads, scratch), grow=parent)
    typer.echo(f"ready: {target}")


@app.command()
def features(
    folder: Annotated[str, typer.Argument(help=DATA_HELP)],
    text: Annotated[bool, typer.Option("--text", help="Encode the items' texts.")] = False,
    images: Annotated[str | None, typer.Option(help="Encode images: a folder or tar file.")] = None,
    vectors: Annotated[
        str | None, typer.Option(help="Import vectors: a .npy, .safetensors or .parquet file.")
    ] = None,
    modality: Annotated[
        str | None, typer.Option(help="Name of the modality; default: text or image.")
    ] = None,
    encoder: Annotated[
        str | None, typer.Option(help="Default: all-MiniLM-L6-v2 for texts, efficientnet-lite0 for images.")
    ] = None,
    column: Annotated[
        str | None,
        typer.Option(help="Item column with the image paths; default: files named by raw item id."),
    ] = None,
    ids: Annotated[
        str | None, typer.Option(help="File with the raw item id of each row of --vectors.")
    ] = None,
    id_column: Annotated[
        str | None, typer.Option(help="Column of raw item ids in --ids or --vectors; default: item.")
    ] = None,
    vector_column: Annotated[
        str | None, typer.Option(help="Vector column of a Parquet file; default: vector.")
    ] = None,
    missing: Annotated[
        bool, typer.Option("--missing", help="Keep existing vectors, add the missing ones.")
    ] = False,
    force: Annotated[bool, typer.Option("--force", help="Replace an existing modality.")] = False,
) -> None:
    """Add text, image or other vectors to the items of a data folder; an interrupted call is resumed."""
    from findrec.datasets.encoders.add_features import add_features, feature_from_options

    path = find_data_folder(folder)
    name, spec = feature_from_options(
        text=text,
        images=images,
        vectors=vectors,
        modality=modality,
        encoder=encoder,
        column=column,
        ids=ids,
        id_column=id_column,
        vector_column=vector_column,
    )
    typer.echo(add_features(path, name, spec, missing=missing, force=force))


@app.command()
def synthesize(
    target: Annotated[
        str, typer.Argument(help="The folder to write, or a raw log: FILE.csv or FILE.parquet.")
    ],
    profile: Annotated[
        str, typer.Option(help="complete-journey, ml-latest-small, amazon-grocery, or a YAML file.")
    ] = "complete-journey",
    users: Annotated[int | None, typer.Option(help="Default: the number in the profile's data.")] = None,
    items: Annotated[
        int | None, typer.Option(help="Default: in proportion to users, as in the profile.")
    ] = None,
    seed: Annotated[int, typer.Option(help="The same seed gives the same data anywhere.")] = 0,
    force: Annotated[bool, typer.Option("--force", help="Replace an existing data set.")] = False,
) -> None:
    """Generate an event log of any size that resembles a real data set, with planted item features."""
    from findrec.datasets.synthetic.profile import load_profile
    from findrec.datasets.synthetic.synthesize import LOG_KINDS, write_log
    from findrec.datasets.synthetic.synthesize import synthesize as make

    path, loaded = resolve(target), load_profile(profile)
    if path.suffix in LOG_KINDS:
        num_events = write_log(path, loaded, users=users, items=items, seed=seed)
        typer.echo(f"written: {path} ({num_events:,} events)")
        return
    folder = make(path, loaded, users=users, items=items, seed=seed, force=force)
    typer.echo(f"ready: {path} ({folder.manifest.num_events:,} events)")


@app.command()
def stats(
    data: Annotated[str, typer.Argument(help="A data folder, or a recipe (prepared first where needed).")],
    profile: Annotated[str | None, typer.Option(help="Also show the real figures of a profile.")] = None,
    json: Annotated[Path | None, typer.Option(help="Also write the figures to this file.")] = None,
) -> None:
    """Measure a data set: sizes, lengths, popularity, repeats, sessions, drift, features."""
    from findrec.datasets.stats.display import open_data, print_stats, write_stats
    from findrec.datasets.stats.statistics import measure
    from findrec.datasets.synthetic.profile import load_profile

    targets = load_profile(profile).targets if profile is not None else {}
    statistics = measure(open_data(data))
    print_stats(statistics, targets)
    if json is not None:
        write_stats(statistics, json)
        typer.echo(f"written: {json}")


@app.command()
def verify(
    folder: Annotated[str, typer.Argument(help=f"{DATA_HELP} An address (https://, s3://) works too.")],
) -> None:
    """Check every file of a data folder against its manifest, and the consistency of its contents."""
    from findrec.datasets.folder.remote import is_remote
    from findrec.datasets.folder.verify import check_folder

    location = folder if is_remote(folder) else find_data_folder(folder)
    check_folder(location)
    typer.echo(f"complete and unchanged: {location}")


@app.command()
def train(
    config: Annotated[str, typer.Argument(help="Name or path of a run configuration, e.g. demo.")],
    overrides: Annotated[
        list[str] | None, typer.Argument(metavar="[dotted.key=value]...", help="e.g. training.epochs=3")
    ] = None,
    fresh: Annotated[bool, typer.Option("--fresh", help="Delete a run of the same name first.")] = False,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Print the plan, start nothing.")] = False,
) -> None:
    """Train and evaluate a run; the same as python -m findrec.train_dist --config CONFIG."""
    from findrec import train_dist

    flags = [flag for flag, is_set in {"--fresh": fresh, "--dry-run": dry_run}.items() if is_set]
    raise typer.Exit(train_dist.main(["--config", config, *flags, *(overrides or [])]))


@app.command()
def evaluate(
    run: Annotated[str, typer.Argument(help=RUN_HELP)],
    suite: Annotated[
        list[str] | None,
        typer.Option(help="Robustness suite to run instead: noise, missing or length; may be repeated."),
    ] = None,
    level: Annotated[
        list[int] | None,
        typer.Option(min=0, help="Level of the suite: % of the items, or number of events; may be repeated."),
    ] = None,
    shards: Annotated[
        int | None,
        typer.Option(
            min=0, help="Ray workers that share the catalogue's rows; default: evaluation.shards of the run."
        ),
    ] = None,
) -> None:
    """Rank the full catalogue again from the saved checkpoint and print the table."""
    folder = find_run(run)
    if suite or level:
        from findrec.evaluation.run import run_suites

        written = run_suites(folder, list(dict.fromkeys(suite or [])), level or [])
        typer.echo(f"written: {', '.join(map(str, written))}")
        return
    from findrec.evaluation.run import evaluate_run

    evaluate_run(folder, shards)
    typer.echo(f"written: {folder / 'metrics.json'}, {folder / 'report.html'}")


@app.command()
def report(run: Annotated[str, typer.Argument(help=RUN_HELP)]) -> None:
    """Write report.html again from the files of the run folder."""
    folder = find_run(run)
    from findrec.evaluation.run import rebuild_report

    rebuild_report(folder)
    typer.echo(f"written: {folder / 'report.html'}")


@app.command()
def compare(
    runs: Annotated[list[str], typer.Argument(metavar="RUN...", help=f"{RUN_HELP} One or several.")],
    metric: Annotated[
        list[str] | None,
        typer.Option(help="ndcg@K, recall@K, mrr@K, mrr, mean_rank or auc; may be repeated."),
    ] = None,
    split: Annotated[str, typer.Option(help="test or valid.")] = "test",
    model: Annotated[
        list[str] | None,
        typer.Option(
            help="Model to compare, may be repeated, or all. Default: all models of a single run, or the "
            "main model of each of several runs."
        ),
    ] = None,
    resamples: Annotated[int, typer.Option(min=100, help="Number of bootstrap resamples of users.")] = 10_000,
    seed: Annotated[int, typer.Option(min=0, help="The same seed gives the same digits.")] = 0,
    json: Annotated[
        Path | None, typer.Option(help="Also write the figures of every pair to this file.")
    ] = None,
) -> None:
    """Test which differences between models of one or several runs are significant."""
    folders = [find_run(run) for run in runs]
    from findrec.evaluation.compare.compare import compare_runs
    from findrec.evaluation.compare.display import print_comparison, write_comparison

    metrics = dict.fromkeys(metric or ["ndcg@10"])
    comparison = compare_runs(
        folders, list(metrics), split=split, models=model or (), resamples=resamples, seed=seed
    )
    print_comparison(comparison)
    if json is not None:
        write_comparison(comparison, json)
        typer.echo(f"written: {json}")


app.command()(leaderboard)
app.command()(tune)
app.command()(config)


@app.command("inspect")
def inspect_user(
    run: Annotated[str, typer.Argument(help=RUN_HELP)],
    user: Annotated[str, typer.Option(help="Raw id of a user in the run's data.")],
    last: Annotated[int, typer.Option(min=1, help="Number of latest positions shown.")] = 30,
) -> None:
    """Show which expert and modality carried each position of a user, and the alignment over training."""
    folder = find_run(run)
    from findrec.evaluation.inspect.display import print_inspection, write_inspection
    from findrec.evaluation.inspect.inspect import inspect_run

    inspection = inspect_run(folder, user, last)
    print_inspection(inspection)
    page, picture = write_inspection(folder, inspection)
    typer.echo(f"written: {page}, {picture}")


app.command("index")(index_run)
app.command()(recommend)
app.command()(similar)
app.command()(export)
app.command()(serve)


@app.command()
def doctor() -> None:
    """Report what is installed and usable on this machine, and how to fix what is not."""
    from findrec.cli.doctor import examine, format_findings

    findings = examine()
    typer.echo(format_findings(findings))
    raise typer.Exit(1 if any(finding.fatal for finding in findings) else 0)


@app.command()
def version() -> None:
    """Print FindRec's version."""
    typer.echo(__version__)


def main(argv: Sequence[str] | None = None) -> int:
    """Run a command and return its exit code: 0 success, 2 invalid input."""
    drop_checkout_from_sys_path()
    try:
        app(args=argv, prog_name="findrec")
    except SystemExit as end:  # how typer returns, for usage errors too
        return end.code if isinstance(end.code, int) else 0
    except FindRecError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except OSError as error:
        print(f"error: {system_error(error) or printable(str(error))}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
