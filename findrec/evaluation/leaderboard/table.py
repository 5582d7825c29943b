"""Computes the tables of a leaderboard from the saved ranks of its runs and baselines.

A line is a row or a baseline. The metric of a user is averaged over the seeds of a row; intervals and
p-values are from a paired bootstrap over users of these averages
(`findrec.evaluation.metrics.significance`), with Holm's correction over all lines and metrics of a data set.
The standard deviation over seeds is given beside them, and is not part of the intervals.

Shape letters: C cases.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from findrec.config import RunConfig
from findrec.datasets.folder.data_folder import DataFolder
from findrec.errors import FindRecError
from findrec.evaluation.compare.results import Evaluated, check_same, metric_values, read_models, read_rows
from findrec.evaluation.leaderboard.checks import Checked
from findrec.evaluation.leaderboard.config import Leaderboard
from findrec.evaluation.leaderboard.costs import Cost, cost_of
from findrec.evaluation.leaderboard.keys import Published, published_on
from findrec.evaluation.leaderboard.measure import evaluate_baselines, suites_of
from findrec.evaluation.metrics.metrics import FloatArray, IntArray, reported, user_means
from findrec.evaluation.metrics.significance import LEVEL, RESAMPLES, Comparison, compare_models
from findrec.evaluation.suites.suites import METRICS as SUITE_METRICS
from findrec.evaluation.suites.suites import Suite
from findrec.progress import progress
from findrec.training.checkpoints.validations import SELECTS
from findrec.training.runs import run_folder

COLD_K = 50


@dataclass(frozen=True)
class Change:
    """The difference of a line to the reference: the mean over users, its interval and Holm's p."""

    value: float
    low: float
    high: float
    p: float
    real: bool  # p < 1 - level


@dataclass(frozen=True)
class Value:
    """A metric of a line; `spread` is the standard deviation over seeds, None for less than two."""

    mean: float
    spread: float | None
    seeds: tuple[float, ...]  # the value of each seed, in the order of the seeds
    change: Change | None = None  # None for the reference


@dataclass(frozen=True)
class Line:
    """A row or a baseline of one table."""

    label: str
    trained: bool
    metrics: Mapping[str, Value]
    valid: Value | None  # the validation metric that selects the checkpoint, at that checkpoint
    cold: Value | None  # recall@50 of targets without training events, a mean over cases
    weights: int | None
    costs: tuple[Cost | None, ...]  # of each seed; None where it was not logged; empty for a baseline
    plain: Value  # the metric of the suites with unaltered inputs
    suites: Mapping[
        str, Mapping[int, Value]
    ]  # the same by kind and level, where the line uses what is altered


@dataclass(frozen=True)
class DataTable:
    """The table of one data set."""

    data: str
    recipe: str
    events_sha256: str
    protocol: str
    users: int
    cases: int
    cold_cases: int
    resamples: int
    comparisons: int  # that Holm's correction covers
    suite_metric: str
    lines: tuple[Line, ...]  # the rows, then the baselines, in the order of the file
    published: tuple[Published, ...] = ()  # results of others, which no figure of the lines depends on


@dataclass(frozen=True)
class _Results:
    """What was measured of one line: a result for each seed."""

    label: str
    tested: list[Evaluated]
    runs: list[RunConfig]  # empty for a baseline
    suites: list[list[Suite]]  # of each seed


def make_tables(leaderboard: Leaderboard, checked: Checked, resamples: int = RESAMPLES) -> list[DataTable]:
    """Evaluate baselines and suites where needed, and compute the table of each data set.

    All runs must be trained and evaluated (`train_runs`). Raises `FindRecError` if results are missing,
    damaged, or not of the same cases.
    """
    return [_table(leaderboard, checked, data, resamples) for data in checked.folders]


def _table(leaderboard: Leaderboard, checked: Checked, data: str, resamples: int) -> DataTable:
    folder, wanted = checked.folders[data], leaderboard.config.suites
    shared = leaderboard.baselines[data]
    baselines = evaluate_baselines(shared, folder)
    lines = []
    with progress(f"results of {data}", len(leaderboard.rows), "rows", after_s=1.0) as bar:
        for row in leaderboard.rows:
            configs = [run.config for run in leaderboard.of(data, row)]
            tested = [_result(config, "test") for config in configs]
            suites = [list(suites_of(config, folder, wanted)) for config in configs]
            lines.append(_Results(row, tested, configs, suites))
            bar.advance()
    of_baselines = list(suites_of(shared, folder, wanted, trained=False)) if baselines else []
    lines += [_Results(title, [one], [], [of_baselines]) for title, one in baselines.items()]
    check_same({f"{line.label}, {n}": one for line in lines for n, one in enumerate(line.tested, start=1)})
    first = lines[0].tested[0]
    if first.data.get("events_sha256") != folder.manifest.events_sha256:
        raise FindRecError(
            f"the results in {first.run} are of other data than {folder.location}. Delete that folder, or "
            "change the leaderboard's `name`; then start again"
        )
    if len(np.unique(first.user)) < 2:
        raise FindRecError(f"{folder.location} has one test user: an interval needs two or more")
    metrics = leaderboard.config.metrics
    values = {
        name: {line.label: [metric_values(one, name) for one in line.tested] for line in lines}
        for name in metrics
    }
    means = {
        name: {label: np.mean(seeds, axis=0) for label, seeds in by_label.items()}
        for name, by_label in values.items()
    }
    reference = leaderboard.config.reference
    comparison = compare_models(means, first.user, resamples=resamples, level=LEVEL, reference=reference)
    cold_C = folder.train_count[first.target] == 0
    suite_metric = next((name for name in metrics if name in SUITE_METRICS), SUITE_METRICS[0])
    return DataTable(
        data=data,
        recipe=folder.manifest.recipe,
        events_sha256=folder.manifest.events_sha256,
        protocol=str(first.row["protocol"]),
        users=comparison.users,
        cases=len(first.user),
        cold_cases=int(cold_C.sum()),
        resamples=resamples,
        comparisons=len(comparison.differences),
        suite_metric=suite_metric,
        lines=tuple(
            Line(
                label=line.label,
                trained=bool(line.runs),
                metrics={
                    name: _value(first.user, values[name][line.label], _change(comparison, name, line.label))
                    for name in metrics
                },
                valid=_valid(line, folder),
                cold=_cold(line.tested, cold_C),
                weights=checked.weights.get((data, line.label)) if line.runs else None,
                costs=tuple(cost_of(config) for config in line.runs),
                plain=_value(first.user, [metric_values(one, suite_metric) for one in line.tested]),
                suites=_suites(line, suite_metric, wanted),
            )
            for line in lines
        ),
        published=published_on(leaderboard.config.published, data, list(leaderboard.config.data)),
    )


def _result(config: RunConfig, split: str) -> Evaluated:
    return read_models(run_folder(config), split, [config.model.title])[0]


def _summary(seeds: Sequence[float], change: Change | None = None) -> Value:
    spread = float(np.std(seeds, ddof=1)) if len(seeds) > 1 else None
    return Value(float(np.mean(seeds)), spread, tuple(float(one) for one in seeds), change)


def _value(user_C: IntArray, seeds: Sequence[FloatArray], change: Change | None = None) -> Value:
    """A metric from its values of cases, `[C]` for each seed; users count equally."""
    return _summary([float(user_means(user_C, values_C).mean()) for values_C in seeds], change)


def _change(comparison: Comparison, metric: str, label: str) -> Change | None:
    for one in comparison.differences:
        if (one.metric, one.first) == (metric, label):
            return Change(one.value, one.low, one.high, one.p_holm, comparison.is_significant(one))
    return None


def _valid(line: _Results, folder: DataFolder) -> Value | None:
    paths = [(one.run, one.model) for one in line.tested]
    if not all(read_rows(path).get("valid") for path, _ in paths):
        return None
    found = [read_models(path, "valid", [model])[0] for path, model in paths]
    return _value(found[0].user, [metric_values(one, SELECTS) for one in found])


def _cold(tested: Sequence[Evaluated], cold_C: NDArray[np.bool_]) -> Value | None:
    metric = f"recall@{COLD_K}"
    if not cold_C.any() or not all(reported(metric, one.limit) for one in tested):
        return None
    return _summary([float(metric_values(one, metric)[cold_C].mean()) for one in tested])


def _suites(line: _Results, metric: str, wanted: Mapping[str, Sequence[int]]) -> dict[str, dict[int, Value]]:
    """The metric over seeds by kind of suite and wanted level."""
    found: dict[str, dict[int, list[float]]] = {}
    for suites, one in zip(line.suites, line.tested, strict=True):
        for suite in suites:
            for curve in suite.curves:
                for point in curve.of(metric) if curve.model == one.model else []:
                    if point.level in wanted[suite.kind]:
                        found.setdefault(suite.kind, {}).setdefault(point.level, []).append(point.value)
    return {
        kind: {level: _summary(values) for level, values in sorted(levels.items())}
        for kind, levels in found.items()
    }
