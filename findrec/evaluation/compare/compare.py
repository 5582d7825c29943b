"""Compares models of one or several finished runs on the same cases, from their saved ranks."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from findrec.errors import FindRecError, suggest
from findrec.evaluation.compare.results import (
    ALL_MODELS,
    Evaluated,
    check_same,
    metric_values,
    read_models,
    read_rows,
)
from findrec.evaluation.metrics.significance import RESAMPLES, Comparison, compare_models


@dataclass(frozen=True)
class RunComparison:
    """The comparison, its protocol, and the origin of each model."""

    comparison: Comparison
    split: str
    protocol: str
    cases: int
    origin: Mapping[str, Evaluated]  # by the model's name in `comparison`


def compare_runs(
    runs: Sequence[Path],
    metrics: Sequence[str] = ("ndcg@10",),
    *,
    split: str = "test",
    models: Sequence[str] = (),
    resamples: int = RESAMPLES,
    seed: int = 0,
) -> RunComparison:
    """Compare the models of one run with each other, or models of several runs.

    `models` are the names to compare, in the runs that have them, `("all",)` all models of each run; by
    default all models of a single run, or the first model of each of several runs. Raises `FindRecError` if
    a run has no usable ranks, if its data, protocol or cases differ from those of the first, if a metric or
    model is unknown, or if there are fewer than two models or two users.
    """
    again = sorted({str(run) for run in runs if list(runs).count(run) > 1})
    if again:
        raise FindRecError(f"{again[0]} is given more than once: a run does not differ from itself")
    results = [one for run in runs for one in read_models(run, split, models, whole=len(runs) == 1)]
    if missing := [name for name in models if name not in (ALL_MODELS, *(one.model for one in results))]:
        known = {str(row["model"]): None for run in runs for row in read_rows(run).get(split, [])}
        raise FindRecError(
            f"no run has a model {missing[0]!r}{suggest(missing[0], known)} (available: {', '.join(known)})"
        )
    if len(results) < 2:
        only = ", ".join(f"{one.model} of {one.run}" for one in results)
        raise FindRecError(
            f"a comparison needs two models, there is only {only}. Name a second run, or include the "
            f"baselines (--model {ALL_MODELS})."
        )
    origin = dict(zip(_labels(results), results, strict=True))
    check_same(origin)
    values = {name: {label: metric_values(one, name) for label, one in origin.items()} for name in metrics}
    first = results[0]
    if len(np.unique(first.user)) < 2:
        raise FindRecError(f"{first.run} has one user in the {split} split: an interval needs two or more")
    compared = compare_models(values, first.user, resamples=resamples, seed=seed)
    return RunComparison(compared, split, str(first.row["protocol"]), len(first.user), origin)


def _labels(results: Sequence[Evaluated]) -> list[str]:
    runs = {one.run for one in results}
    if len(runs) == 1:
        return [one.model for one in results]
    distinct = len({run.name for run in runs}) == len(runs)
    return [f"{one.run.name if distinct else one.run}: {one.model}" for one in results]
