"""What `findrec compare` prints and writes: one table a metric, every pair in the JSON file."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from findrec.errors import FindRecError
from findrec.evaluation.compare import RunComparison
from findrec.evaluation.report import format_number
from findrec.evaluation.significance import Difference, Estimate

LOWER_IS_BETTER = ("mean_rank",)


def comparison_table(compared: RunComparison, metric: str) -> Table:
    """The models, best first: value, interval, difference to the best, and which ones each really beats."""
    found = compared.found
    ordered = _best_first([e for e in found.estimates if e.metric == metric])
    number = {estimate.model: n for n, estimate in enumerate(ordered, start=1)}
    beaten: dict[str, list[int]] = {estimate.model: [] for estimate in ordered}
    to_best: dict[str, Difference] = {}
    for difference in found.differences:
        if difference.metric != metric:
            continue
        pair = (difference.first, difference.second)
        if ordered[0].model in pair:
            to_best[pair[1] if pair[0] == ordered[0].model else pair[0]] = difference
        if found.is_real(difference):
            winner, loser = pair if (difference.value > 0) != (metric in LOWER_IS_BETTER) else pair[::-1]
            beaten[winner].append(number[loser])
    percent = f"{100 * found.level:g} %"
    table = Table(title=f"{metric}, {compared.split}", title_justify="left")
    table.add_column("", justify="right")
    table.add_column("model")
    for name in (metric, percent, "to the best", percent, "p", "really better than"):
        table.add_column(name, justify="right" if name != "really better than" else "left")
    for estimate in ordered:
        cells = [format_number(estimate.value), _interval(estimate.low, estimate.high), "", "", ""]
        if estimate.model in to_best:
            difference = to_best[estimate.model]
            value, low, high = difference.value, difference.low, difference.high
            if difference.second == estimate.model:
                value, low, high = -value, -high, -low
            cells[2:] = [_signed(value), _interval(low, high, signed=True), _p(difference.p_holm)]
        beats = ", ".join(str(n) for n in sorted(beaten[estimate.model])) or "-"
        table.add_row(str(number[estimate.model]), escape(estimate.model), *cells, beats)
    return table


def describe(compared: RunComparison) -> Iterator[str]:
    """How it was measured and what the figures do not say, a line each."""
    found = compared.found
    limit, count = 1 - found.level, len(found.differences)
    yield f"{compared.protocol}; {found.users:,} users, {compared.cases:,} cases"
    yield (
        f"intervals and p: paired bootstrap over users, {found.resamples:,} resamples, seed {found.seed}; p "
        f"after Holm's correction for {count:,} comparison{'s' * (count != 1)}; real: p < {limit:.2g}"
    )
    yield "an interval is of its own comparison alone, so one that leaves out 0 is not yet a real difference"
    yield "the models are taken as trained: what another training seed would change is not in the intervals"
    needed = math.ceil(2 * count / limit)
    if needed > found.resamples:
        yield (
            f"NOTE: {found.resamples:,} resamples cannot show that one of {count:,} differences is real: "
            f"take --resamples {2 * needed}"
        )


def print_comparison(compared: RunComparison) -> None:
    """Print a table for each metric and the lines that explain them."""
    console = Console(width=None if Console().is_terminal else 130)
    for metric in dict.fromkeys(estimate.metric for estimate in compared.found.estimates):
        console.print(comparison_table(compared, metric))
    for line in describe(compared):
        console.print(line, markup=False, highlight=False, soft_wrap=True)


def write_comparison(compared: RunComparison, path: Path) -> None:
    """Write everything as JSON: the settings, each model's estimates and every pair's difference."""
    found = compared.found
    models = {name: {"run": str(o.run), "model": o.model} for name, o in compared.origin.items()}
    tree: dict[str, Any] = {
        "split": compared.split,
        "protocol": compared.protocol,
        "data": dict(next(iter(compared.origin.values())).data),
        "users": found.users,
        "cases": compared.cases,
        "resamples": found.resamples,
        "seed": found.seed,
        "level": found.level,
        "models": models,
        "estimates": [asdict(estimate) for estimate in found.estimates],
        "differences": [asdict(d) | {"real": found.is_real(d)} for d in found.differences],
    }
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(tree, indent=1, allow_nan=False) + "\n", encoding="utf-8")
    except OSError as error:
        raise FindRecError(f"cannot write {path}: {error.strerror or error}") from error


def _best_first(estimates: list[Estimate]) -> list[Estimate]:
    return sorted(estimates, key=lambda e: e.value if e.metric in LOWER_IS_BETTER else -e.value)


def _signed(value: float) -> str:
    value += 0.0  # so that no zero is negative
    return ("+" if value >= 0 else "") + format_number(value)


def _interval(low: float, high: float, *, signed: bool = False) -> str:
    shown = _signed if signed else format_number
    return f"{shown(low)} .. {shown(high)}"


def _p(value: float) -> str:
    return "1" if value >= 1 else f"{value:.4f}" if value >= 1e-4 else f"{value:.0e}"
