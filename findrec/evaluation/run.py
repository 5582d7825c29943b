"""From a run folder to its results: the best checkpoints and the baselines ranked, tables and report written.

`python -m findrec.train_dist` ends with this, and `findrec evaluate RUN` does the same again: one code path,
so the digits are the same.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from contextlib import nullcontext
from pathlib import Path

from rich.console import Console

from findrec.cluster.launch import ray_session
from findrec.config import RunConfig
from findrec.datasets.folder import DataFolder
from findrec.datasets.prepare import open_data_folder
from findrec.errors import FindRecError
from findrec.evaluation.baselines import make_baseline
from findrec.evaluation.candidates import describe_rule
from findrec.evaluation.evaluate import Ranked, Rows, evaluate_scorers, write_results
from findrec.evaluation.inspect import inspect_user
from findrec.evaluation.load import load_scorer, set_up
from findrec.evaluation.metrics import seen_filter
from findrec.evaluation.plots import PLOTS, save_plot
from findrec.evaluation.report import draw_users, format_table, sample_recommendations
from findrec.evaluation.report_page import write_report
from findrec.evaluation.scorers import Scorer
from findrec.evaluation.suites import run_suite, write_suite
from findrec.evaluation.suites_show import print_suite, suite_figure
from findrec.evaluation.thumbnails import thumbnails
from findrec.models.findrec import FindRec
from findrec.progress import say
from findrec.training.runs import TRAINED_BASELINES, checkpoint_folder, read_run_config, training_jobs
from findrec.training.tracking import Tracker
from findrec.training.validations import best_checkpoint

INSPECTED = 20  # positions of a sample user in the report


def scorer_names(config: RunConfig) -> list[str]:
    """Who is ranked: trained models first, then the other baselines, in the order of the configuration."""
    trained = [job.name for job in training_jobs(config, Path())]
    return [*trained, *(name for name in config.evaluation.baselines if name not in TRAINED_BASELINES)]


def rank_scorers(
    run: Path,
    folder: DataFolder,
    names: Sequence[str],
    *,
    shards: int,
    known: Mapping[str, Ranked] | None = None,
) -> Ranked:
    """Rank the full catalogue with some of `scorer_names`, trained ones at their best checkpoint; `known` are
    those ranked before.
    """
    config = read_run_config(run)
    device = set_up(config)
    jobs = {job.name: job for job in training_jobs(config, run)}

    def scorers() -> Iterator[Scorer | Ranked]:
        for name in names:
            if known and name in known:
                yield known[name]
                continue
            say(f"ranking {name}")
            yield load_scorer(jobs[name], folder, device) if name in jobs else make_baseline(name, folder)

    with ray_session(config) if shards else nullcontext():
        return evaluate_scorers(
            scorers(),
            folder,
            ks=config.evaluation.ks,
            users_per_block=config.evaluation.users_per_block,
            max_length=config.data.max_length,
            mask_seen=seen_filter(config.evaluation.mask_seen, folder),
            candidates=config.evaluation.candidates,
            sampled=config.evaluation.sampled,
            shards=shards,
            scratch=run,
        )


def evaluate_run(
    run_folder: Path,
    shards: int | None = None,
    *,
    known: Mapping[str, Ranked] | None = None,
    show: bool = True,
) -> Rows:
    """Rank the full catalogue with the run's best checkpoint and its baselines, but for the `known` ones;
    write all results.

    Writes `metrics.json`, `ranks.parquet` and `report.html`, mirrors the test row to MLflow, prints the table
    (if it is to `show` it) and returns the metrics rows by split.
    """
    config = read_run_config(run_folder)
    folder = open_data_folder(config.data)
    shards = config.evaluation.shards if shards is None else shards
    results = rank_scorers(run_folder, folder, scorer_names(config), shards=shards, known=known)
    if "test" not in results.rows:
        raise FindRecError(
            f"nobody in {folder.path} can be tested: no user has an event in the test split, one before it, "
            f"and a target among evaluation.candidates ({describe_rule(config.evaluation.candidates)}). "
            "Prepare the data with a split that leaves test events, or change evaluation.candidates in "
            f"{run_folder / 'config.yaml'}"
        )
    write_results(run_folder, *results, folder)
    rebuild_report(run_folder)
    _mirror(config, run_folder, results.rows)
    if show:
        print_table(results.rows)
    return results.rows


def run_suites(run_folder: Path, kinds: Sequence[str], levels: Sequence[int] = ()) -> list[Path]:
    """Run robustness suites (`findrec.evaluation.suites`), print their tables and put them into the report.

    Returns the files written: `suites/<kind>.json` and the pictures in `plots/`.
    """
    if not kinds:
        raise FindRecError("--level is for a suite: name one with --suite noise, missing or length")
    written = []
    for kind in kinds:
        suite = run_suite(run_folder, kind, levels=levels)
        written.append(write_suite(run_folder, suite))
        print_suite(suite)
        save_plot(run_folder, f"suite-{kind}", suite_figure(suite))
        written += [run_folder / PLOTS / f"suite-{kind}.{end}" for end in ("png", "svg")]
    return [*written, rebuild_report(run_folder)]


def rebuild_report(run_folder: Path) -> Path:
    """Write `report.html` and `plots/` anew from what the run folder holds; returns the page's path."""
    config = read_run_config(run_folder)
    folder = open_data_folder(config.data)
    job = training_jobs(config, run_folder)[0]
    scorer = load_scorer(job, folder)
    users = draw_users(folder, "test", config.evaluation.samples, seed=config.training.seed)
    samples = sample_recommendations(
        scorer,
        folder,
        "test",
        users,
        max_length=config.data.max_length,
        mask_seen=seen_filter(config.evaluation.mask_seen, folder),
        candidates=config.evaluation.candidates,
    )
    shown = [named.item for s in samples for named in (*s.history, *s.target, *s.recommended)]
    inspection = None
    if len(users) and isinstance(scorer.model, FindRec) and scorer.catalogue.modalities:
        inspection = inspect_user(scorer, folder, int(users[0]), INSPECTED)
    return write_report(
        run_folder,
        folder=folder,
        samples=samples,
        thumbnails=thumbnails(config, folder, shown),
        inspection=inspection,
    )


def print_table(rows: Rows) -> None:
    """The test table on standard output."""
    Console(width=None if Console().is_terminal else 120).print(format_table(rows["test"], title="test"))


def _mirror(config: RunConfig, run_folder: Path, rows: Rows) -> None:
    for job in training_jobs(config, run_folder):
        tracker = Tracker.start(job.config, job.folder)
        row = next(r for r in rows["test"] if r["model"] == job.name)
        saved = best_checkpoint(checkpoint_folder(job.folder))
        values = {f"test/{k}": v for k, v in row.items() if isinstance(v, float)}
        step = json.loads((saved.path / "state.json").read_text())["step"] if saved else 0
        tracker.log(step, values)
        if saved is not None:
            tracker.tag("checkpoint", str(saved.path))
        tracker.finish("FINISHED")
