"""Evaluates a run: ranks its best checkpoints and its baselines, and writes metrics, ranks and report.

Used at the end of `python -m findrec.train_dist` and by `findrec evaluate RUN`, with identical results.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import nullcontext
from pathlib import Path

from findrec.baseline_configs import BaselineConfig
from findrec.config import RunConfig
from findrec.datasets.folder.configured import open_data_folder
from findrec.datasets.folder.data_folder import DataFolder
from findrec.errors import FindRecError
from findrec.evaluation.check import check_test_split
from findrec.evaluation.display.plots import PLOTS, save_plot
from findrec.evaluation.display.thumbnails import thumbnails
from findrec.evaluation.display.wording import draw_users, format_table, sample_recommendations
from findrec.evaluation.inspect.inspect import alignment_curves, inspect_user
from findrec.evaluation.protocol import RankingProtocol
from findrec.evaluation.ranking.evaluate import Ranked, Rows, evaluate_scorers, write_results
from findrec.evaluation.report.page import write_report
from findrec.evaluation.scoring.base import Scorer
from findrec.evaluation.scoring.baselines import make_baseline
from findrec.evaluation.scoring.inner_product import ModelScorer
from findrec.evaluation.scoring.load import check_run_data, load_ranker, set_up
from findrec.evaluation.suites.display import print_suite, suite_figure
from findrec.evaluation.suites.suites import run_suite, write_suite
from findrec.models.capabilities import Explains
from findrec.progress import Console, say
from findrec.ray_session import ray_session
from findrec.training.checkpoints.checkpoint import checkpoint_folder, read_state
from findrec.training.checkpoints.validations import best_checkpoint_path
from findrec.training.logs.tracking import Tracker
from findrec.training.runs import BASELINES, main_job, read_run_config, training_jobs

INSPECTED_POSITIONS = 20  # of the sample user in the report


def scorer_names(config: RunConfig) -> list[str]:
    """Names of all ranked scorers: trained models, then the other baselines, in the configured order."""
    trained = [job.name for job in training_jobs(config, Path()) if job.ranked]
    return [*trained, *(b.title for b in config.baselines if isinstance(b, BaselineConfig))]


def rank_scorers(
    run: Path,
    folder: DataFolder,
    names: Sequence[str],
    *,
    shards: int,
    known: Mapping[str, Ranked] | None = None,
) -> Ranked:
    """Evaluate some of `scorer_names`, trained models at their best checkpoint.

    Results in `known`, by name, are reused.
    """
    config = read_run_config(run)
    device = set_up(config)
    jobs = {job.name: job for job in training_jobs(config, run)}
    untrained = {b.title: b for b in config.baselines if isinstance(b, BaselineConfig)}

    def scorers() -> Iterator[Scorer | Ranked]:
        for name in names:
            if known and name in known:
                yield known[name]
                continue
            say(f"ranking {name}")
            if name in jobs:
                yield load_ranker(jobs[name], folder, device)
            else:
                yield make_baseline(untrained[name], folder)

    with ray_session(config) if shards else nullcontext():
        protocol = RankingProtocol.of(config, folder)
        return evaluate_scorers(scorers(), folder, protocol, shards=shards, scratch=run)


def evaluate_run(
    run_folder: Path,
    shards: int | None = None,
    *,
    known: Mapping[str, Ranked] | None = None,
    show: bool = True,
) -> Rows:
    """Evaluate the run's best checkpoint and its baselines, and write all results.

    Writes `metrics.json`, `ranks.parquet` and `report.html`, logs the test metrics to MLflow and, with
    `show`, prints the test table. Results in `known`, by name, are reused. Returns the metrics rows by split.

    Raises:
        FindRecError: if no user can be tested.
    """
    config = read_run_config(run_folder)
    folder = open_data_folder(config.data)
    shards = config.evaluation.shards if shards is None else shards
    check_test_split(config, folder)
    check_run_data(config, run_folder, folder)  # `known` results were made earlier
    results = rank_scorers(run_folder, folder, scorer_names(config), shards=shards, known=known)
    write_results(run_folder, *results, folder)
    rebuild_report(run_folder)
    _log_test_metrics(config, run_folder, results.rows)
    if show:
        print_table(results.rows)
    return results.rows


def run_suites(run_folder: Path, kinds: Sequence[str], levels: Sequence[int] = ()) -> list[Path]:
    """Run robustness suites (see `run_suite`), print their tables and update the report.

    Returns the files written: `suites/<kind>.json`, the plots and the report.
    """
    if not kinds:
        raise FindRecError("--level needs a suite: add --suite noise, missing or length")
    written = []
    for kind in kinds:
        suite = run_suite(run_folder, kind, levels=levels)
        written.append(write_suite(run_folder, suite))
        print_suite(suite)
        save_plot(run_folder, f"suite-{kind}", suite_figure(suite))
        written += [run_folder / PLOTS / f"suite-{kind}.{end}" for end in ("png", "svg")]
    return [*written, rebuild_report(run_folder)]


def rebuild_report(run_folder: Path) -> Path:
    """Rewrite `report.html` and `plots/` from the files of the run folder; returns the report's path."""
    config = read_run_config(run_folder)
    folder = open_data_folder(config.data)
    scorer = load_ranker(main_job(config, run_folder), folder)
    users = draw_users(folder, "test", config.evaluation.samples, seed=config.training.seed)
    samples = sample_recommendations(scorer, folder, "test", users, RankingProtocol.of(config, folder))
    shown = [named.item for s in samples for named in (*s.history, *s.target, *s.recommended)]
    inspection = None
    model = None
    if isinstance(scorer, ModelScorer):
        model = scorer.model
        if len(users) and isinstance(model, Explains) and scorer.catalogue.modalities:
            inspection = inspect_user(scorer, folder, int(users[0]), INSPECTED_POSITIONS)
    return write_report(
        run_folder,
        folder=folder,
        samples=samples,
        thumbnails=thumbnails(config, folder, shown),
        inspection=inspection,
        alignment=alignment_curves(run_folder, model),
    )


def print_table(rows: Rows) -> None:
    """Print the test table to standard output."""
    Console(width=None if Console().is_terminal else 120).print(format_table(rows["test"], title="test"))


def _log_test_metrics(config: RunConfig, run_folder: Path, rows: Rows) -> None:
    for job in (job for job in training_jobs(config, run_folder) if job.ranked):
        tracker = Tracker.add_results(job.config, job.folder)
        path = best_checkpoint_path(checkpoint_folder(job.folder))
        tracker.log(0 if path is None else read_state(path).step, _test_values(rows, job.name))
        if path is not None:
            tracker.tag("checkpoint", str(path))
        tracker.finish("FINISHED")
    for baseline in config.baselines:
        if config.tracking.enabled and isinstance(baseline, BaselineConfig):
            folder = run_folder / BASELINES / baseline.title
            folder.mkdir(parents=True, exist_ok=True)
            tracker = Tracker.add_results(config, folder, baseline)
            tracker.log(0, _test_values(rows, baseline.title))
            tracker.finish("FINISHED")


def _test_values(rows: Rows, model: str) -> dict[str, float]:
    row = next(row for row in rows["test"] if row["model"] == model)
    return {f"test/{key}": value for key, value in row.items() if isinstance(value, float)}
