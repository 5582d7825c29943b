"""Robustness suites: rank a trained run with altered inputs, without retraining.

    noise    the features of p % of the items are permuted
    missing  each modality is removed from p % of the items
    length   only the latest n events of each history are used

Noise and missing apply to scorers that use features, length to all. Each level is a full evaluation of the
test split under the run's protocol; a line's reference level (0 %, the model's training length, a baseline's
full history) gives the results of the plain evaluation. Altered items are drawn several times and metrics of
a case averaged over draws. Intervals and differences from the reference are from a paired bootstrap over
users with Holm's correction within the line (`findrec.evaluation.metrics.significance`); they do not include
the variation between draws.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import numpy as np

from findrec.datasets.folder.configured import open_data_folder
from findrec.datasets.folder.data_folder import DataFolder
from findrec.errors import FindRecError, suggest
from findrec.evaluation.metrics.metrics import FloatArray, IntArray, case_metrics
from findrec.evaluation.metrics.significance import LEVEL, RESAMPLES, compare_models
from findrec.evaluation.protocol import RankingProtocol
from findrec.evaluation.ranking.evaluate import rank_split
from findrec.evaluation.scoring.load import set_up
from findrec.evaluation.suites.inputs import KINDS, Kind, Line, suite_lines
from findrec.files import replacing
from findrec.progress import progress, say
from findrec.training.runs import read_run_config, training_jobs

METRICS = ("ndcg@10", "recall@10", "mrr")
DRAWS = 3
SUITES = "suites"  # subfolder of a run folder


@dataclass(frozen=True)
class Point:
    """A model's mean over users at one level, and its change from the reference level."""

    level: int
    metric: str
    value: float
    low: float
    high: float
    change: float
    change_low: float
    change_high: float
    p: float  # after Holm's correction; 1 at the reference


@dataclass(frozen=True)
class Curve:
    """All levels and metrics of one scorer."""

    model: str
    reference: int
    points: tuple[Point, ...]

    def of(self, metric: str) -> list[Point]:
        """The points of one metric, by level."""
        return [point for point in self.points if point.metric == metric]


@dataclass(frozen=True)
class Suite:
    """The content of `suites/<kind>.json`. Levels are % of the items, or numbers of events."""

    kind: Kind
    run: str
    split: str
    protocol: str
    users: int
    cases: int
    draws: int  # of the altered items
    resamples: int
    confidence: float
    curves: tuple[Curve, ...]


def run_suite(
    run_folder: Path,
    kind: str,
    *,
    levels: Sequence[int] = (),
    draws: int = DRAWS,
    resamples: int = RESAMPLES,
    trained: bool = True,
) -> Suite:
    """Evaluate a run at each level of a suite, including the reference level.

    `levels` are % of the items (0..100) or numbers of events (default: `SHARES` or `LENGTHS` of
    `suites.inputs`); models with learned positions skip longer histories. Without `trained` only the
    baselines that need no training are evaluated. Raises `FindRecError` for an unknown suite, invalid levels,
    a run without a checkpoint, or if no scorer of the run uses features.
    """
    chosen = check_suite(kind, levels)
    config = read_run_config(run_folder)
    folder = open_data_folder(config.data)
    device, protocol = set_up(config), RankingProtocol.of(config, folder)
    curves, users, cases = [], 0, 0
    jobs = [job for job in training_jobs(config, run_folder) if job.ranked and trained]
    for line in suite_lines(chosen, config, jobs, folder, device, levels, draws):
        say(f"suite {kind}: {line.model}")
        values, user_C = _evaluate(line, protocol, folder)
        users, cases = len(np.unique(user_C)), len(user_C)
        if users < 2:
            raise FindRecError(f"{folder.path} has fewer than two test users: an interval needs two or more")
        curves.append(_curve(line, values, user_C, resamples))
    if not curves:
        raise FindRecError(
            f"suite {kind}: nothing in {run_folder} uses features of items. Train a model that reads "
            f"modalities on data with features ({folder.path} has {', '.join(folder.modalities) or 'none'}); "
            "the suite `length` works for every run"
        )
    return Suite(
        kind=chosen,
        run=run_folder.name,
        split="test",
        protocol=protocol.describe(folder),
        users=users,
        cases=cases,
        draws=1 if chosen == "length" else draws,
        resamples=resamples,
        confidence=LEVEL,
        curves=tuple(curves),
    )


def check_suite(kind: str, levels: Sequence[int]) -> Kind:
    """The kind of a suite; raises `FindRecError` if there is no such suite, or for impossible levels."""
    if kind not in KINDS:
        raise FindRecError(f"no suite {kind!r}{suggest(kind, KINDS)} (available: {', '.join(KINDS)})")
    chosen = next(known for known in KINDS if known == kind)
    least, most = (1, None) if chosen == "length" else (0, 100)
    for level in levels:
        if level < least or (most is not None and level > most):
            expected = "events, 1 or more" if most is None else "per cent of the items, 0 to 100"
            raise FindRecError(f"suite {kind}: levels are {expected}, not {level}")
    return chosen


def _evaluate(
    line: Line, protocol: RankingProtocol, folder: DataFolder
) -> tuple[dict[str, dict[str, FloatArray]], IntArray]:
    """Values `[C]` by metric and level, and the user of each case."""
    values: dict[str, dict[str, FloatArray]] = {name: {} for name in METRICS}
    user_C: IntArray = np.zeros(0, dtype=np.int64)
    total = sum(line.draws(level) for level in line.levels)
    with progress(f"suite: {line.model}", total, "evaluations") as bar:
        for level in line.levels:
            drawn: dict[str, list[FloatArray]] = {name: [] for name in METRICS}
            for draw in range(line.draws(level)):
                scorer, length = line.make(level, draw)
                ranks = rank_split(scorer, folder, "test", replace(protocol, max_length=length))
                user_C = ranks.user
                metrics = case_metrics(ranks.rank, [10], folder.num_items)
                for name in METRICS:
                    drawn[name].append(metrics[name])
                bar.advance()
            for name in METRICS:
                values[name][str(level)] = np.mean(drawn[name], axis=0)
    return values, user_C


def _curve(line: Line, values: dict[str, dict[str, FloatArray]], user_C: IntArray, resamples: int) -> Curve:
    comparison = compare_models(values, user_C, resamples=resamples, reference=str(line.reference))
    changes = {(d.metric, d.first): d for d in comparison.differences}
    points = []
    for one in comparison.estimates:
        change = changes.get((one.metric, one.model))
        difference = (0.0, 0.0, 0.0, 1.0)
        if change is not None:
            difference = (change.value, change.low, change.high, change.p_holm)
        points.append(Point(int(one.model), one.metric, one.value, one.low, one.high, *difference))
    return Curve(line.model, line.reference, tuple(points))


def write_suite(run_folder: Path, suite: Suite) -> Path:
    """Write `suites/<kind>.json` in one rename; equal results give equal bytes."""
    path = run_folder / SUITES / f"{suite.kind}.json"
    path.parent.mkdir(exist_ok=True)
    with replacing(path) as part:
        part.write_text(json.dumps(asdict(suite), indent=1, allow_nan=False) + "\n", encoding="utf-8")
    return path


def read_suites(run_folder: Path) -> list[Suite]:
    """The suites of a run folder; raises `FindRecError` for a damaged file."""
    suites = []
    for kind in KINDS:
        path = run_folder / SUITES / f"{kind}.json"
        if not path.is_file():
            continue
        try:
            tree = json.loads(path.read_text(encoding="utf-8"))
            tree["curves"] = tuple(
                Curve(one["model"], one["reference"], tuple(Point(**point) for point in one["points"]))
                for one in tree["curves"]
            )
            suites.append(Suite(**tree))
        except (ValueError, KeyError, TypeError) as error:
            raise FindRecError(
                f"{path} is damaged ({error}). Write it again with `findrec evaluate {run_folder.name} "
                f"--suite {kind}`"
            ) from None
    return suites
