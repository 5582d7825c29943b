"""The `findrec` command and what it is told: data sets, runs, reports.

Heavy packages are imported inside the commands: `findrec --help` answers at once.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated

import typer

from findrec import __version__
from findrec.cli_lists import RUN_HELP, index_run, recommend
from findrec.errors import FindRecError
from findrec.paths import drop_checkout_from_sys_path, find_run, resolve

app = typer.Typer(
    help="Train and evaluate multimodal recommenders on very long histories.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)


@app.command()
def prepare(
    recipe: Annotated[str, typer.Argument(help="Name or path of a recipe, e.g. ml-100k.")],
    folder: Annotated[str | None, typer.Option(help="Where to write; default: data/<recipe name>.")] = None,
    force: Annotated[bool, typer.Option("--force", help="Make it anew even if it is there.")] = False,
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
    """Fetch a data set and write its data folder; returns at once when it is there already."""
    from findrec.config import DataConfig
    from findrec.datasets.engine import Limits
    from findrec.datasets.prepare import data_folder_of
    from findrec.datasets.prepare import prepare as make
    from findrec.datasets.recipe import load_recipe

    loaded = load_recipe(recipe)
    target = data_folder_of(DataConfig(recipe=recipe, folder=folder))  # where a run looks for it
    parent = None
    if grow is not None:
        given = Path(grow).expanduser()
        parent = given.resolve() if given.is_dir() else resolve(grow)
    make(loaded, target, force=force, limits=Limits.of(memory_gib, threads, scratch), grow=parent)
    typer.echo(f"ready: {target}")


@app.command()
def features(
    folder: Annotated[str, typer.Argument(help="A data folder, e.g. data/ml-100k.")],
    text: Annotated[bool, typer.Option("--text", help="Encode the items' texts.")] = False,
    images: Annotated[str | None, typer.Option(help="Encode pictures: a folder or tar of them.")] = None,
    vectors: Annotated[
        str | None, typer.Option(help="Take ready vectors: a .npy, .safetensors or .parquet file.")
    ] = None,
    modality: Annotated[str | None, typer.Option(help="Its name; default: text or image.")] = None,
    encoder: Annotated[
        str | None, typer.Option(help="Default: all-MiniLM-L6-v2 for texts, efficientnet-lite0 for pictures.")
    ] = None,
    column: Annotated[
        str | None, typer.Option(help="Item column with the pictures' paths; default: named by raw item id.")
    ] = None,
    ids: Annotated[
        str | None, typer.Option(help="File with the raw item id of each row of --vectors.")
    ] = None,
    id_column: Annotated[str | None, typer.Option(help="Its column, or Parquet's; default: item.")] = None,
    vector_column: Annotated[str | None, typer.Option(help="Of a Parquet file; default: vector.")] = None,
    missing: Annotated[
        bool, typer.Option("--missing", help="Keep what is there, add items without.")
    ] = False,
    force: Annotated[bool, typer.Option("--force", help="Replace the modality that is there.")] = False,
) -> None:
    """Give a data folder's items text, image or other vectors; goes on where it was when it was stopped."""
    from findrec.datasets.add_features import add_features, asked_for

    given = Path(folder).expanduser()
    path = given.resolve() if given.is_dir() else resolve(folder)
    name, spec = asked_for(
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
    target: Annotated[str, typer.Argument(help="A folder, or a raw log to write: FILE.csv or FILE.parquet.")],
    profile: Annotated[
        str, typer.Option(help="complete-journey, ml-latest-small, amazon-grocery, or a YAML file.")
    ] = "complete-journey",
    users: Annotated[int | None, typer.Option(help="Default: as many as the profile's data has.")] = None,
    items: Annotated[int | None, typer.Option(help="Default: in the profile's proportion to users.")] = None,
    seed: Annotated[int, typer.Option(help="The same seed gives the same data anywhere.")] = 0,
    force: Annotated[bool, typer.Option("--force", help="Replace another data set that is there.")] = False,
) -> None:
    """Make an event log of any size that resembles a real data set, with planted item features."""
    from findrec.datasets.profile import load_profile
    from findrec.datasets.synthesize import LOG_KINDS, write_log
    from findrec.datasets.synthesize import synthesize as make

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
    profile: Annotated[str | None, typer.Option(help="Show a profile's real figures beside them.")] = None,
    json: Annotated[Path | None, typer.Option(help="Write the figures here too.")] = None,
) -> None:
    """Measure a data set: sizes, lengths, popularity, repeats, sessions, drift, features."""
    from findrec.datasets.profile import load_profile
    from findrec.datasets.stats import measure
    from findrec.datasets.stats_show import open_data, print_stats, write_stats

    targets = load_profile(profile).targets if profile is not None else {}
    found = measure(open_data(data))
    print_stats(found, targets)
    if json is not None:
        write_stats(found, json)
        typer.echo(f"written: {json}")


@app.command()
def verify(
    folder: Annotated[str, typer.Argument(help="A data folder, e.g. data/ml-100k, or its address.")],
) -> None:
    """Check every file of a data folder against its manifest, and what is in it."""
    from findrec.datasets.check import check_folder
    from findrec.datasets.remote import is_remote

    given = Path(folder).expanduser()
    place = folder if is_remote(folder) else given.resolve() if given.is_dir() else resolve(folder)
    check_folder(place)
    typer.echo(f"whole and unaltered: {place}")


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

    flags = [flag for flag, given in {"--fresh": fresh, "--dry-run": dry_run}.items() if given]
    raise typer.Exit(train_dist.main(["--config", config, *flags, *(overrides or [])]))


@app.command()
def evaluate(
    run: Annotated[str, typer.Argument(help=RUN_HELP)],
    suite: Annotated[
        list[str] | None,
        typer.Option(help="Instead, vary the inputs: noise, missing or length; may be repeated."),
    ] = None,
    level: Annotated[
        list[int] | None,
        typer.Option(min=0, help="Of the suite: % of the items, or events; may be repeated."),
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
    """Write report.html anew from what the run folder holds."""
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
            help="Taken from each run, may be repeated; all: every one. Default: all of a single run, of "
            "several the one each is named for."
        ),
    ] = None,
    resamples: Annotated[int, typer.Option(min=100, help="How often users are drawn anew.")] = 10_000,
    seed: Annotated[int, typer.Option(min=0, help="The same seed gives the same digits.")] = 0,
    json: Annotated[Path | None, typer.Option(help="Write every pair's figures here too.")] = None,
) -> None:
    """Say which differences between models of one or several runs are real."""
    folders = [find_run(run) for run in runs]
    from findrec.evaluation.compare import compare_runs
    from findrec.evaluation.compare_show import print_comparison, write_comparison

    wanted = dict.fromkeys(metric or ["ndcg@10"])
    found = compare_runs(
        folders, list(wanted), split=split, models=model or (), resamples=resamples, seed=seed
    )
    print_comparison(found)
    if json is not None:
        write_comparison(found, json)
        typer.echo(f"written: {json}")


@app.command("inspect")
def inspect_user(
    run: Annotated[str, typer.Argument(help=RUN_HELP)],
    user: Annotated[str, typer.Option(help="Raw id of a user in the run's data.")],
    last: Annotated[int, typer.Option(min=1, help="Positions shown, the latest ones.")] = 30,
) -> None:
    """Show which expert and modality carried each position of a user, and the alignment over training."""
    folder = find_run(run)
    from findrec.evaluation.inspect import inspect_run
    from findrec.evaluation.inspect_show import print_inspection, write_inspection

    found = inspect_run(folder, user, last)
    print_inspection(found)
    page, picture = write_inspection(folder, found)
    typer.echo(f"written: {page}, {picture}")


app.command("index")(index_run)
app.command()(recommend)


@app.command()
def doctor() -> None:
    """Say what is installed and usable here, and how to get what is not."""
    from findrec.doctor import examine, format_findings

    findings = examine()
    typer.echo(format_findings(findings))
    raise typer.Exit(1 if any(finding.fatal for finding in findings) else 0)


@app.command()
def version() -> None:
    """Print FindRec's version."""
    typer.echo(__version__)


def main(argv: Sequence[str] | None = None) -> int:
    """Run a command and return its exit code: 0 done, 2 a mistake in what was given."""
    drop_checkout_from_sys_path()
    try:
        app(args=argv, prog_name="findrec")
    except SystemExit as end:  # how typer returns, for usage errors too
        return end.code if isinstance(end.code, int) else 0
    except FindRecError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except PermissionError as error:
        print(
            f"error: no permission for {error.filename}. Choose another folder (FINDREC_HOME decides where "
            "relative ones lie) or change its rights.",
            file=sys.stderr,
        )
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
