"""The tables of a leaderboard as text: results, robustness and cost of each data set, with notes."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Literal

from findrec.evaluation.compare.display import format_p, interval, signed
from findrec.evaluation.display.wording import format_number
from findrec.evaluation.leaderboard.config import Leaderboard
from findrec.evaluation.leaderboard.costs import SHARE, Cost
from findrec.evaluation.leaderboard.keys import Published
from findrec.evaluation.leaderboard.table import COLD_K, DataTable, Line, Value
from findrec.evaluation.metrics.significance import LEVEL, resamples_needed
from findrec.evaluation.suites.display import TITLES
from findrec.evaluation.suites.inputs import KINDS
from findrec.progress import format_seconds
from findrec.training.checkpoints.validations import SELECTS

_NONE = "–"
Kind = Literal["trained", "baseline", "published"]


@dataclass(frozen=True)
class Row:
    """A row of a sheet.

    Attributes:
        label: the label of its line, or the name of a published result.
        kind: what its figures are from.
        cells: what follows the label.
        significant: numbers of the cells with a significant difference.
    """

    label: str
    kind: Kind
    cells: list[str]
    significant: tuple[int, ...] = ()


@dataclass(frozen=True)
class Sheet:
    """One table; `header` has a title for the label and for each cell."""

    title: str
    header: list[str]
    rows: list[Row]
    is_cost: bool = False  # whether it differs between two trainings with equal results


def sheets_of(leaderboard: Leaderboard, table: DataTable) -> Iterator[Sheet]:
    """The results of a data set, then of its robustness suites, then the cost of its trainings."""
    yield _results(leaderboard, table)
    if any(line.suites for line in table.lines):
        suites = leaderboard.config.suites
        columns = [(kind, level) for kind, levels in suites.items() for level in sorted(set(levels))]
        names = [f"{kind} {level:,}{'' if kind == 'length' else ' %'}" for kind, level in columns]
        rows = []
        for line in table.lines:
            values = [line.suites.get(kind, {}).get(level) for kind, level in columns]
            rows.append(_row(line, [_mean(line.plain), *map(_mean, values)]))
        title = f"{table.data}, robustness: {table.suite_metric}"
        yield Sheet(title, ["row", "as tested", *names], rows)
    yield _costs(table)


def _results(leaderboard: Leaderboard, table: DataTable) -> Sheet:
    metrics = leaderboard.config.metrics
    header = ["row"]
    for metric in metrics:
        header += [metric, f"vs. {leaderboard.config.reference}", f"{100 * LEVEL:g} %", "p"]
    header.append(f"valid {SELECTS}")
    if table.cold_cases:
        header.append(f"cold HR@{COLD_K}")
    rows = []
    for line in table.lines:
        cells = [cell for metric in metrics for cell in _measured(line.metrics[metric])]
        cells += [_mean(line.valid), *([_mean(line.cold)] if table.cold_cases else [])]
        changes = [line.metrics[metric].change for metric in metrics]
        real = tuple(4 * n + 1 for n, change in enumerate(changes) if change is not None and change.real)
        rows.append(_row(line, cells, real))
    for one in table.published:
        cells = [cell for metric in metrics for cell in (_published(one, metric), "", "", "")]
        rows.append(Row(one.name, "published", cells + [""] * (len(header) - 1 - len(cells))))
    return Sheet(table.data, header, rows)


def _costs(table: DataTable) -> Sheet:
    header = ["row", "weights", "targets/s", f"time to {100 * SHARE:g} %", "time", "memory", "GPU memory"]
    rows = []
    for line in table.lines:
        if line.trained:
            costs = line.costs
            cells = [
                format_number(line.weights),
                _over_seeds(costs, lambda cost: cost.targets_per_s, lambda value: f"{value:,.0f}"),
                _over_seeds(costs, lambda cost: cost.seconds_to_share, format_seconds),
                _over_seeds(costs, lambda cost: cost.seconds, format_seconds),
                _over_seeds(costs, lambda cost: cost.memory_gib, _gib, largest=True),
                _over_seeds(costs, lambda cost: cost.gpu_gib, _gib, largest=True),
            ]
            rows.append(_row(line, cells))
    if all(row.cells[-1] == _NONE for row in rows):  # trained without GPUs
        header.pop()
        for row in rows:
            row.cells.pop()
    return Sheet(f"{table.data}, cost", header, rows, is_cost=True)


def _over_seeds(
    costs: Sequence[Cost | None],
    value_of: Callable[[Cost], float | None],
    shown: Callable[[float], str],
    *,
    largest: bool = False,
) -> str:
    """The mean over seeds, or the largest; a dash if a seed has none."""
    values = [None if cost is None else value_of(cost) for cost in costs]
    known = [value for value in values if value is not None]
    if not known or len(known) < len(values):
        return _NONE
    return shown(max(known) if largest else sum(known) / len(known))


def _gib(value: float) -> str:
    return f"{value:.2f} GiB"


def _row(line: Line, cells: list[str], significant: tuple[int, ...] = ()) -> Row:
    return Row(line.label, "trained" if line.trained else "baseline", cells, significant)


def _published(result: Published, metric: str) -> str:
    return format_number(result.metrics[metric]) if metric in result.metrics else _NONE


def _measured(value: Value) -> list[str]:
    change = value.change
    if change is None:
        return [_mean(value), "", "", ""]
    star = "*" if change.real else ""
    return [
        _mean(value),
        signed(change.value) + star,
        interval(change.low, change.high, with_sign=True),
        format_p(change.p),
    ]


def _mean(value: Value | None) -> str:
    if value is None:
        return _NONE
    spread = "" if value.spread is None else f" ± {format_number(value.spread)}"
    return format_number(value.mean) + spread


def title_of(row: Row) -> str:
    """How a row is called in a table."""
    return f"{row.label} (published)" if row.kind == "published" else row.label


def notes_of(leaderboard: Leaderboard, table: DataTable) -> Iterator[str]:
    """Yield lines that say how the figures of a data set were made and how to read them."""
    seeds = len(leaderboard.config.seeds)
    yield f"{table.protocol}; {table.users:,} users, {table.cases:,} cases"
    if seeds > 1:
        yield f"rows: mean ± standard deviation over {seeds} seeds; differences are of the users' means"
    else:
        yield "rows: of one seed, so the variation between seeds is not known"
    yield (
        f"differences, intervals and p: paired bootstrap over users, {table.resamples:,} resamples; p after "
        f"Holm's correction for {table.comparisons:,} comparison{'s' * (table.comparisons != 1)}; *: "
        f"p < {1 - LEVEL:.2g}. Intervals are not corrected, and variation between seeds is not part of them"
    )
    needed = resamples_needed(table.comparisons)
    if needed > table.resamples:
        yield f"NOTE: {table.resamples:,} resamples are too few for any difference to be significant"
    yield f"valid {SELECTS}: of the checkpoint that was tested, which is the best of its training"
    if table.cold_cases:
        yield (
            f"cold HR@{COLD_K}: share of hits among the first {COLD_K}, over the {table.cold_cases:,} cases "
            "whose target has no training event"
        )
    if any(line.suites for line in table.lines):
        used = {kind for line in table.lines for kind in line.suites}
        names = ", ".join(f"{kind}: {TITLES[kind].lower()}" for kind in KINDS if kind in used)
        yield f"robustness ({names}): {_NONE} where a line does not use what is altered"
    yield from _cost_notes(leaderboard, table)
    for result in table.published:
        yield f"{result.name} (published): {published_note(result)}"


def _cost_notes(leaderboard: Leaderboard, table: DataTable) -> Iterator[str]:
    if (budget := leaderboard.config.budget) is not None:
        given = ", ".join(f"{value:g} {key}" for key, value in budget.given.items())
        if budget.trials is None:
            own = ", ".join(rows_with_own_epochs(leaderboard)) if budget.epochs is not None else ""
            except_for = f"; {own}: earlier stages have epochs of their own" if own else ""
            yield f"budget of each training: {given}{except_for}"
        else:
            yield f"budget of each row: {given}, with the first seed and by the validation metric"
    if any(cost for line in table.lines for cost in line.costs):
        yield (
            "cost: weights with those of embedding tables; targets per second of the last stage; time in "
            f"training steps until the validation metric was at least {100 * SHARE:g} % of its best, and to "
            "the end, of all stages; peak memory of the worker that used most. Means over seeds, for memory "
            "the largest. They depend on the machine and on what else runs on it"
        )


def rows_with_own_epochs(leaderboard: Leaderboard) -> list[str]:
    """The rows whose models have stages that are trained for another number of epochs than the budget."""
    return list(
        dict.fromkeys(
            run.row
            for run in leaderboard.runs
            for stage in run.config.model.stages()
            if stage.training.get("epochs", run.config.training.epochs) != run.config.training.epochs
        )
    )


def published_note(result: Published) -> str:
    """Where a published result is from, and whether it can be compared with the rows."""
    text = result.source
    if not result.comparable:
        text += ". NOT COMPARABLE"
    return text if not result.note else f"{text}: {result.note}"
