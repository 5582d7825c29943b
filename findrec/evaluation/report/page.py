"""Writes `report.html`: all results of a run on one page that works offline."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from findrec.datasets.folder.data_folder import DataFolder
from findrec.environment import describe_environment
from findrec.errors import FindRecError
from findrec.evaluation.compare.compare import compare_runs
from findrec.evaluation.display.page import write_page
from findrec.evaluation.display.wording import COLUMNS, Sample, best_values, format_number, protocol_lines
from findrec.evaluation.inspect.display import summary
from findrec.evaluation.inspect.inspect import Curve, Inspection
from findrec.evaluation.metrics.significance import FEWEST_RESAMPLES, RESAMPLES
from findrec.evaluation.report.figures import (
    alignment_plots,
    inspection_plot,
    list_plots,
    serving_plots,
    strata_plot,
    suite_plot,
    training_plots,
)
from findrec.evaluation.suites.display import TITLES, level_name, suite_note
from findrec.evaluation.suites.suites import METRICS, Suite, read_suites
from findrec.text import redacted
from findrec.training.checkpoints.validations import read_validations
from findrec.training.logs.metrics_log import read_lines

_DRAWS = 300_000_000  # maximum number of users drawn in a bootstrap: some seconds
_LISTS = {
    "coverage": "coverage of the catalogue",
    "gini": "gini of the listed items",
    "novelty": "novelty (bits)",
}
Cell = dict[str, Any]


def write_report(
    run_folder: Path,
    *,
    folder: DataFolder,
    samples: Sequence[Sample] = (),
    thumbnails: Mapping[int, str] | None = None,
    inspection: Inspection | None = None,
    alignment: Sequence[Curve] = (),
) -> Path:
    """Write `report.html` from the files of the run folder, without the parts whose files are missing.

    Reads `metrics.jsonl` and `validations.jsonl` (curves), `metrics.json` (tables), `ranks.parquet`
    (differences), `suites/` and `config.yaml`. `thumbnails` are `data:` URIs by item. Equal run folders give
    equal bytes.
    """
    results = _read_json(run_folder / "metrics.json")
    config = run_folder / "config.yaml"
    test, strata = results.get("test", []), results.get("strata", [])
    lists = _lists_table(test)
    return write_page(
        run_folder / "report.html",
        "report/report.html.j2",
        name=run_folder.name,
        data=folder.manifest,
        tables=[_results(split, results[split]) for split in ("test", "valid") if results.get(split)],
        differences=_differences(run_folder, test),
        strata=_strata_table(strata),
        strata_plots=[strata_plot(run_folder, strata)] if strata else [],
        lists=lists,
        list_plots=list_plots(run_folder, test, _list_titles(test)) if lists else [],
        sampled=_sampled(results.get("sampled", [])),
        curves=training_plots(
            run_folder, _logged_values(run_folder), without={curve.name for curve in alignment}
        ),
        alignment=alignment_plots(run_folder, alignment),
        inspection=_inspection(run_folder, inspection),
        suites=[_suite(run_folder, suite) for suite in read_suites(run_folder)],
        serving=serving_plots(run_folder),
        samples=samples,
        thumbnails=thumbnails or {},
        environment=describe_environment(),
        config=redacted(config.read_text(encoding="utf-8")) if config.is_file() else "(no config.yaml)",
    )


def _logged_values(run_folder: Path) -> list[dict[str, Any]]:
    """The values logged by training and by an asynchronous evaluator."""
    validations = [
        {"step": one.step, "epoch": one.epoch} | one.logged for one in read_validations(run_folder)
    ]
    return [*read_lines(run_folder / "metrics.jsonl"), *validations]


def _read_json(path: Path) -> dict[str, Any]:
    tree: dict[str, Any] = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
    return tree


def _cell(value: Any, error: float | None = None, *, best: bool = False) -> Cell:
    text = value if isinstance(value, str) else format_number(value)
    return {"text": text, "error": "" if error is None else format_number(1.96 * error), "best": best}


def _metrics(rows: Sequence[Mapping[str, Any]], columns: Sequence[str]) -> list[list[Cell]]:
    best = best_values(rows, columns)
    return [
        [_cell(str(row["model"]))]
        + [_cell(row.get(c), row.get(f"{c}_se"), best=c in best and row.get(c) == best[c]) for c in columns]
        for row in rows
    ]


def _results(split: str, rows: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    columns = [name for name in COLUMNS if any(name in row for row in rows)]
    return {
        "split": split,
        "protocols": protocol_lines(rows),
        "columns": ["model", *columns],
        "rows": _metrics(rows, columns),
        "dense": False,
    }


def _differences(run_folder: Path, rows: Sequence[Mapping[str, Any]]) -> dict[str, Any] | None:
    """Compare the run's first model with each of the others by a paired bootstrap over users."""
    if len(rows) < 2:
        return None
    users = max(1, int(rows[0].get("users", 1)))
    resamples = max(FEWEST_RESAMPLES, min(RESAMPLES, _DRAWS // users))
    try:
        comparison = compare_runs([run_folder], ["ndcg@10", "recall@10"], resamples=resamples).comparison
    except FindRecError as error:
        return {"note": str(error), "rows": []}
    lead = comparison.estimates[0].model
    table = []
    for one in comparison.differences:
        if one.first == lead:
            interval = f"[{one.low:+.4f}, {one.high:+.4f}]"
            real = comparison.is_significant(one)
            values = (one.metric, one.second, f"{one.value:+.4f}", interval, f"{one.p_holm:.4f}")
            table.append([*map(_cell, values), _cell("yes" if real else "no", best=real)])
    note = (
        f"{lead} minus each other model on the same {comparison.users:,} users: {comparison.level:.0%} "
        f"intervals of a paired bootstrap ({comparison.resamples:,} resamples), p after Holm's correction "
        "over all pairs. Variation between training seeds is not included."
    )
    columns = ["metric", f"{lead} minus", "difference", "interval", "p", "real"]
    return {"note": note, "columns": columns, "rows": table, "dense": False}


def _strata_table(rows: Sequence[Mapping[str, Any]]) -> dict[str, Any] | None:
    if not rows:
        return None
    columns = [name for name in rows[0] if name != "split" and not name.endswith("_se")]
    values = [[_cell(row.get(name), row.get(f"{name}_se")) for name in columns] for row in rows]
    return {"columns": columns, "rows": values, "dense": True}


def _list_titles(rows: Sequence[Mapping[str, Any]]) -> dict[str, str]:
    names = {key.partition("@")[0] for row in rows for key in row if "@" in key and not key.endswith("_se")}
    similar = {
        name: f"similarity in a list by {name[4:]}" for name in sorted(names) if name.startswith("ils_")
    }
    return {name: title for name, title in (_LISTS | similar).items() if name in names}


def _lists_table(rows: Sequence[Mapping[str, Any]]) -> dict[str, Any] | None:
    wanted = _list_titles(rows)
    columns = [key for name in wanted for key in (rows[0] if rows else ()) if key.startswith(f"{name}@")]
    if not columns:
        return None
    values = [[_cell(str(row["model"])), *(_cell(row.get(c)) for c in columns)] for row in rows]
    return {"columns": ["model", *columns], "rows": values, "dense": True}


def _sampled(rows: Sequence[Mapping[str, Any]]) -> dict[str, Any] | None:
    if not rows:
        return None
    columns = [key for key in rows[0] if "@" in key and not key.endswith("_se")]
    return {
        "note": "; ".join(dict.fromkeys(f"{row['split']}: {row['protocol']}" for row in rows)),
        "columns": ["model", *columns],
        "rows": _metrics(rows, columns),
        "dense": True,
    }


def _inspection(run_folder: Path, inspection: Inspection | None) -> dict[str, Any] | None:
    if inspection is None:
        return None
    plots = [inspection_plot(run_folder, inspection)]
    return {"user": inspection.user, "plots": plots, "summary": summary(inspection)}


def _suite(run_folder: Path, suite: Suite) -> dict[str, Any]:
    rows = []
    for curve in suite.curves:
        for lead in curve.of(METRICS[0]):
            cells = [_cell(curve.model), _cell(level_name(suite, lead.level))]
            for point in (point for point in curve.points if point.level == lead.level):
                real = point.p < 1 - suite.confidence
                cells.append(_cell(point.value))
                change = "" if lead.level == curve.reference else f"{point.change:+.4f}"
                interval = f" [{point.change_low:+.4f}, {point.change_high:+.4f}]" if change else "reference"
                cells.append(_cell(change + interval, best=real))
            rows.append(cells)
    columns = ["model", "level", *(name for metric in METRICS for name in (metric, "change"))]
    return {
        "title": TITLES[suite.kind],
        "note": suite_note(suite),
        "plots": [suite_plot(run_folder, suite)],
        "table": {"columns": columns, "rows": rows, "dense": True},
    }
