"""Tunes the rows of a leaderboard, all with the same number of trials."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from findrec.config import parse_config
from findrec.errors import FindRecError
from findrec.evaluation.leaderboard.config import Leaderboard, Run
from findrec.evaluation.leaderboard.trees import expand
from findrec.progress import say
from findrec.schema import flatten
from findrec.tuning.report import best_trial, write_report
from findrec.tuning.space import Space, find_space, with_values
from findrec.tuning.study import run_study


def tune_rows(leaderboard: Leaderboard, command: str) -> Leaderboard:
    """The leaderboard with the best values of `budget.trials` trials of each row on each data set.

    Keys that a row sets stay as they are. Trials have the first seed and are compared by the validation
    metric; all seeds of a row are trained with the values found. Without that budget the leaderboard is
    returned as it is. Raises `FindRecError` if a model has no search space or no trial of a row could be
    validated.
    """
    budget = leaderboard.config.budget
    if budget is None or budget.trials is None:
        return leaderboard
    first = {(run.data, run.row): run for run in reversed(leaderboard.runs)}
    spaces = {cell: _space(leaderboard, run) for cell, run in first.items()}  # all, before any training
    found: dict[tuple[str, str], Mapping[str, Any]] = {}
    for cell, run in reversed(first.items()):
        say(f"tuning {run.data}, {run.row}")
        trials = run_study(run.config, spaces[cell], trials=budget.trials)
        write_report(run.config, spaces[cell], trials, command)
        found[cell] = best_trial(trials).values
    return replace(leaderboard, runs=tuple(_tuned(run, found[run.data, run.row]) for run in leaderboard.runs))


def _space(leaderboard: Leaderboard, run: Run) -> Space:
    fixed = flatten(expand(leaderboard.config.rows[run.row] or {}, run.row))
    keys = {key: tried for key, tried in find_space(run.config).keys.items() if key not in fixed}
    if not keys:
        raise FindRecError(f"row {run.row!r} sets all keys of its search space: there is nothing to tune")
    return Space(keys)


def _tuned(run: Run, values: Mapping[str, Any]) -> Run:
    tree = with_values(run.tree, values)
    return replace(run, tree=tree, config=parse_config(tree, source=run.title))
