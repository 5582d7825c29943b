"""Output of `findrec compare`: one table per metric, and a JSON file with every pair of models."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any

from rich.markup import escape
from rich.table import Table

from findrec.errors import FindRecError
from findrec.evaluation.compare.compare import RunComparison
from findrec.evaluation.display.wording import format_number
from findrec.evaluation.metrics.significance import Difference, Estimate, resamples_needed
from findrec.progress import Console

LOWER_IS_BETTER = ("mean_rank",)


def comparison_table(compared: RunComparison, metric: str) -> Table:
    """A table of the models, best first: value, interval, difference to the best, significant wins."""
    comparison = compared.comparison
    ordered = _best_first([e for e in comparison.estimates if e.metric == metric])
    number = {estimate.model: n for n, estimate in enumerate(ordered, start=1)}
    beaten: dict[str, list[int]] = {estimate.model: [] for estimate in ordered}
    to_best: dict[str, Difference] = {}
    for difference in comparison.differences:
        if difference.metric != metric:
            continue
        pair = (difference.first, difference.second)
        if ordered[0].model in pair:
            to_best[pair[1] if pair[0] == ordered[0].model else pair[0]] = difference
        if comparison.is_significant(difference):
            winner, loser = pair if (difference.value > 0) != (metric in LOWER_IS_BETTER) else pair[::-1]
            beaten[winner].append(number[loser])
    percent = f"{100 * comparison.level:g} %"
    table = Table(title=f"{metric}, {compared.split}", title_justify="left")
    table.add_column("", justify="right")
    table.add_column("model")
    for name in (metric, percent, "vs. best", percent, "p", "significantly better than"):
        table.add_column(name, justify="right" if name != "significantly better than" else "left")
    for estimate in ordered:
        cells = [format_number(estimate.value), interval(estimate.low, estimate.high), "", "", ""]
        if estimate.model in to_best:
            difference = to_best[estimate.model]
            value, low, high = difference.value, difference.low, difference.high
            if difference.second == estimate.model:
                value, low, high = -value, -high, -low
            cells[2:] = [signed(value), interval(low, high, with_sign=True), format_p(difference.p_holm)]
        beats = ", ".join(str(n) for n in sorted(beaten[estimate.model])) or "-"
        table.add_row(str(number[estimate.model]), escape(estimate.model), *cells, beats)
    return table


def describe(compared: RunComparison) -> Iterator[str]:
    """Yield lines that explain how the comparison was made and how to read it."""
    comparison = compared.comparison
    limit, count = 1 - comparison.level, len(comparison.differences)
    yield f"{compared.protocol}; {comparison.users:,} users, {compared.cases:,} cases"
    yield (
        f"intervals and p: paired bootstrap over users, {comparison.resamples:,} resamples, seed "
        f"{comparison.seed}; p after Holm's correction for {count:,} comparison{'s' * (count != 1)}; real: "
        f"p < {limit:.2g}"
    )
    yield "intervals are not corrected for multiple comparisons: one that excludes 0 may still not be real"
    yield "each model is one training: variation between training seeds is not part of the intervals"
    needed = resamples_needed(count, comparison.level)
    if needed > comparison.resamples:
        yield (
            f"NOTE: {comparison.resamples:,} resamples are too few for any of {count:,} differences to be "
            f"real: use --resamples {2 * needed}"
        )


def print_comparison(compared: RunComparison) -> None:
    """Print a table for each metric and the lines that explain them."""
    console = Console(width=None if Console().is_terminal else 130)
    for metric in dict.fromkeys(estimate.metric for estimate in compared.comparison.estimates):
        console.print(comparison_table(compared, metric))
    for line in describe(compared):
        console.print(line, markup=False, highlight=False, soft_wrap=True)


def write_comparison(compared: RunComparison, path: Path) -> None:
    """Write settings, estimates and differences as JSON; raises `FindRecError` if that fails."""
    comparison = compared.comparison
    models = {name: {"run": str(o.run), "model": o.model} for name, o in compared.origin.items()}
    tree: dict[str, Any] = {
        "split": compared.split,
        "protocol": compared.protocol,
        "data": dict(next(iter(compared.origin.values())).data),
        "users": comparison.users,
        "cases": compared.cases,
        "resamples": comparison.resamples,
        "seed": comparison.seed,
        "level": comparison.level,
        "models": models,
        "estimates": [asdict(estimate) for estimate in comparison.estimates],
        "differences": [asdict(d) | {"real": comparison.is_significant(d)} for d in comparison.differences],
    }
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(tree, indent=1, allow_nan=False) + "\n", encoding="utf-8")
    except OSError as error:
        raise FindRecError(f"cannot write {path}: {error.strerror or error}") from error


def _best_first(estimates: list[Estimate]) -> list[Estimate]:
    return sorted(estimates, key=lambda e: e.value if e.metric in LOWER_IS_BETTER else -e.value)


def signed(value: float) -> str:
    """Format a difference with its sign."""
    value += 0.0  # -0.0 becomes 0.0
    return ("+" if value >= 0 else "") + format_number(value)


def interval(low: float, high: float, *, with_sign: bool = False) -> str:
    """Format an interval."""
    shown = signed if with_sign else format_number
    return f"{shown(low)} .. {shown(high)}"


def format_p(value: float) -> str:
    """Format a p-value."""
    return "1" if value >= 1 else f"{value:.4f}" if value >= 1e-4 else f"{value:.0e}"
