"""Robustness suites: a trained run ranked again with altered inputs, nothing retrained, as curves.

    noise    p % of the items swap their features among themselves
    missing  of each modality p % of the items are shown without
    length   of each history only the latest n events are shown

Noise and missing are for what uses features, length for all. Each level is a full evaluation of the test
split under the run's own protocol; at a line's reference level (0 %, the length the model was trained with,
the whole history of a baseline) it has the digits of the plain evaluation. Features are drawn several times
and the figures of a case averaged over the draws. Intervals and differences from the reference are of a
paired bootstrap over users with Holm's correction within the line (`findrec.evaluation.significance`): they
know about the luck of the users, not about the luck of few draws.
"""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np

from findrec.config import RunConfig
from findrec.datasets.folder import DataFolder
from findrec.datasets.prepare import open_data_folder
from findrec.errors import FindRecError, suggest
from findrec.evaluation.evaluate import rank_split
from findrec.evaluation.load import set_up
from findrec.evaluation.metrics import FloatArray, IntArray, case_metrics, describe_protocol, seen_filter
from findrec.evaluation.significance import LEVEL, RESAMPLES, compare_models
from findrec.evaluation.suite_inputs import KINDS, Kind, Line, suite_lines
from findrec.progress import progress, say
from findrec.training.runs import read_run_config, training_jobs

METRICS = ("ndcg@10", "recall@10", "mrr")
DRAWS = 3
SUITES = "suites"  # folder of a run


@dataclass(frozen=True)
class Point:
    """A model's mean over users at one level, and what it is more (less: below 0) than at the reference."""

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
    """One line of a suite, all levels of all metrics."""

    model: str
    reference: int
    points: tuple[Point, ...]

    def of(self, metric: str) -> list[Point]:
        """The points of one metric by level."""
        return [point for point in self.points if point.metric == metric]


@dataclass(frozen=True)
class Suite:
    """What is written to `suites/<kind>.json`. Levels are % of the items, or events."""

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
) -> Suite:
    """Evaluate a run at each level; the reference level is always among them.

    `levels` are % of the items (0..100) or numbers of events; by default those of `suite_inputs`. A model
    with learned positions is not asked for more events than it has positions for. Raises `FindRecError` for
    an unknown suite, impossible levels, a run without a checkpoint, or where nothing uses features.
    """
    if kind not in KINDS:
        raise FindRecError(f"no suite {kind!r}{suggest(kind, KINDS)} (there: {', '.join(KINDS)})")
    chosen = next(known for known in KINDS if known == kind)
    least, most = (1, None) if chosen == "length" else (0, 100)
    for level in levels:
        if level < least or (most is not None and level > most):
            wanted = "events, 1 or more" if most is None else "per cent of the items, 0 to 100"
            raise FindRecError(f"suite {kind}: levels are {wanted}, not {level}")
    config = read_run_config(run_folder)
    folder = open_data_folder(config.data)
    device = set_up(config)
    curves, users, cases = [], 0, 0
    jobs = training_jobs(config, run_folder)
    for line in suite_lines(chosen, config, jobs, folder, device, levels, draws):
        say(f"suite {kind}: {line.model}")
        values, user_C = _evaluate(line, config, folder)
        users, cases = len(np.unique(user_C)), len(user_C)
        if users < 2:
            raise FindRecError(f"{folder.path} has fewer than two test users: an interval needs two or more")
        curves.append(_curve(line, values, user_C, resamples))
    if not curves:
        raise FindRecError(
            f"suite {kind}: nothing in {run_folder} uses features of items. Train with model.modalities=all "
            f"on data that has features ({folder.path} has {', '.join(folder.modalities) or 'none'}); "
            "the suite `length` works for every run"
        )
    protocol = describe_protocol(
        folder, seen_filter(config.evaluation.mask_seen, folder), config.evaluation.candidates
    )
    num_draws = 1 if chosen == "length" else draws
    return Suite(
        chosen, run_folder.name, "test", protocol, users, cases, num_draws, resamples, LEVEL, tuple(curves)
    )


def _evaluate(
    line: Line, config: RunConfig, folder: DataFolder
) -> tuple[dict[str, dict[str, FloatArray]], IntArray]:
    """`[C]` numbers by metric and level, and whose cases they are."""
    values: dict[str, dict[str, FloatArray]] = {name: {} for name in METRICS}
    user_C: IntArray = np.zeros(0, dtype=np.int64)
    total = sum(line.draws(level) for level in line.levels)
    with progress(f"suite: {line.model}", total, "evaluations") as bar:
        for level in line.levels:
            drawn: dict[str, list[FloatArray]] = {name: [] for name in METRICS}
            for draw in range(line.draws(level)):
                scorer, shown = line.make(level, draw)
                ranks = rank_split(
                    scorer,
                    folder,
                    "test",
                    users_per_block=config.evaluation.users_per_block,
                    max_length=shown,
                    mask_seen=seen_filter(config.evaluation.mask_seen, folder),
                    candidates=config.evaluation.candidates,
                )
                user_C = ranks.user
                found = case_metrics(ranks.rank, [10], folder.num_items)
                for name in METRICS:
                    drawn[name].append(found[name])
                bar.advance()
            for name in METRICS:
                values[name][str(level)] = np.mean(drawn[name], axis=0)
    return values, user_C


def _curve(line: Line, values: dict[str, dict[str, FloatArray]], user_C: IntArray, resamples: int) -> Curve:
    found = compare_models(values, user_C, resamples=resamples, reference=str(line.reference))
    changes = {(d.metric, d.first): d for d in found.differences}
    points = []
    for one in found.estimates:
        change = changes.get((one.metric, one.model))
        moved = (0.0, 0.0, 0.0, 1.0)
        if change is not None:
            moved = (change.value, change.low, change.high, change.p_holm)
        points.append(Point(int(one.model), one.metric, one.value, one.low, one.high, *moved))
    return Curve(line.model, line.reference, tuple(points))


def write_suite(run_folder: Path, suite: Suite) -> Path:
    """Write `suites/<kind>.json` in one rename; equal results give equal bytes."""
    path = run_folder / SUITES / f"{suite.kind}.json"
    path.parent.mkdir(exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    temporary.write_text(json.dumps(asdict(suite), indent=1, allow_nan=False) + "\n", encoding="utf-8")
    return temporary.replace(path)


def read_suites(run_folder: Path) -> list[Suite]:
    """The suites a run folder holds; `FindRecError` names a file that is damaged."""
    found = []
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
            found.append(Suite(**tree))
        except (ValueError, KeyError, TypeError) as error:
            raise FindRecError(
                f"{path} is damaged ({error}). Write it again with `findrec evaluate {run_folder.name} "
                f"--suite {kind}`"
            ) from None
    return found
