"""Plots of a report, embedded in the page and saved in the run's `plots/`."""

from __future__ import annotations

import re
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure

from findrec.evaluation.display.plots import (
    COLOURS,
    GREY,
    add_legend,
    curve_figure,
    make_grey,
    new_figure,
    save_plot,
)
from findrec.evaluation.display.wording import format_number, is_finite
from findrec.evaluation.index.display import index_curve_figure
from findrec.evaluation.inspect.display import draw_inspection
from findrec.evaluation.inspect.inspect import Curve, Inspection
from findrec.evaluation.suites.display import suite_figure
from findrec.evaluation.suites.suites import Suite

_CURVES = {  # key of metrics.jsonl -> title; the auxiliary terms and diagnostics of a model follow
    "train/loss": "training loss",
    "valid/ndcg@10": "validation NDCG@10",
    "train/targets_per_s": "targets per second",
    "train/data_wait_share": "share of time waiting for data",
}
# Plots about serving: title -> a function that draws it from the run folder and returns None if nothing was
# measured. Add new measurements here.
SERVING: dict[str, Callable[[Path], Figure | None]] = {"recall and latency of indexes": index_curve_figure}


@dataclass(frozen=True)
class Plot:
    """A plot in the page."""

    title: str
    uri: str
    note: str = ""
    broad: bool = False  # as wide as the page


def training_plots(
    run_folder: Path, lines: Sequence[Mapping[str, Any]], *, without: Collection[str] = ()
) -> list[Plot]:
    """Curves of the values logged during training, except for the diagnostics named in `without`."""
    keys = sorted({key for line in lines for key in line})
    titles = _CURVES | {key: key for key in keys if key.startswith("aux/")}
    for key in keys:
        name = key.removeprefix("diagnostics/")
        if name != key and name not in without:
            titles[key] = name.replace("_", " ")
    drawn = []
    for key, title in titles.items():
        points = [(line["step"], line[key]) for line in lines if "step" in line and is_finite(line.get(key))]
        if points:
            steps, values = zip(*points, strict=True)
            uri = save_plot(run_folder, file_name(key), curve_figure(steps, values))
            drawn.append(Plot(title, uri, f"last {format_number(float(values[-1]))}"))
    return drawn


def alignment_plots(run_folder: Path, curves: Sequence[Curve]) -> list[Plot]:
    """Curves of the alignment diagnostics during training."""
    drawn = []
    for curve in curves:
        figure = curve_figure(curve.steps, curve.values)
        uri = save_plot(run_folder, file_name(f"alignment/{curve.name}"), figure)
        note = f"{format_number(curve.values[0])} → {format_number(curve.values[-1])}"
        drawn.append(Plot(curve.name, uri, note))
    return drawn


def inspection_plot(run_folder: Path, inspection: Inspection) -> Plot:
    """Gates and contributions at one user's last positions."""
    figure = draw_inspection(inspection)
    for axes in figure.axes:
        make_grey(axes)
    return Plot(f"user {inspection.user}", save_plot(run_folder, "routing", figure), broad=True)


def strata_plot(run_folder: Path, rows: Sequence[Mapping[str, Any]], metric: str = "ndcg@10") -> Plot:
    """Bars with intervals for each stratum and model."""
    parts = list(dict.fromkeys(str(row["part"]) for row in rows))
    models = list(dict.fromkeys(str(row["model"]) for row in rows))
    figure, (axes,) = new_figure(width=9.2, height=0.9 + 0.09 * (len(models) + 2) * len(parts))
    thick = 0.8 / len(models)
    for number, model in enumerate(models):
        by_part = {str(row["part"]): row for row in rows if row["model"] == model}
        y = [parts.index(part) + thick * (number - (len(models) - 1) / 2) for part in by_part]
        errors = [1.96 * (row.get(f"{metric}_se") or 0.0) for row in by_part.values()]
        axes.barh(
            y,
            [row[metric] for row in by_part.values()],
            height=thick,
            xerr=errors,
            color=COLOURS[number % len(COLOURS)],
            error_kw={"ecolor": GREY, "elinewidth": 0.8},
            label=model,
        )
    cases = {str(row["part"]): row["cases"] for row in rows}
    axes.set_yticks(range(len(parts)), [f"{part} ({cases[part]:,})" for part in parts], fontsize="small")
    axes.invert_yaxis()
    axes.set_xlim(left=0)
    axes.set_xlabel(f"{metric} with 95 % interval (cases in brackets)", color=GREY)
    add_legend(figure, axes)
    return Plot(f"{metric} of parts of the test cases", save_plot(run_folder, "strata", figure), broad=True)


def list_plots(run_folder: Path, rows: Sequence[Mapping[str, Any]], names: Mapping[str, str]) -> list[Plot]:
    """List metrics over the list length, one line per model; `names` maps a metric to its title."""
    drawn = []
    for name, title in names.items():
        figure, (axes,) = new_figure(height=2.8)
        for number, row in enumerate(rows):
            at = {int(k.rpartition("@")[2]): v for k, v in row.items() if k.startswith(f"{name}@")}
            points = sorted((k, v) for k, v in at.items() if v is not None)
            if points:
                ks, values = zip(*points, strict=True)
                colour = COLOURS[number % len(COLOURS)]
                axes.plot(ks, values, "o-", color=colour, markersize=3, label=row["model"])
        axes.set_xlabel("first k items", color=GREY)
        add_legend(figure, axes)
        drawn.append(Plot(title, save_plot(run_folder, file_name(f"lists/{name}"), figure)))
    return drawn


def suite_plot(run_folder: Path, suite: Suite) -> Plot:
    """Curves of one robustness suite."""
    figure = suite_figure(suite)
    return Plot(f"suite {suite.kind}", save_plot(run_folder, f"suite-{suite.kind}", figure), broad=True)


def serving_plots(run_folder: Path) -> list[Plot]:
    """Plots about serving (`SERVING`)."""
    figures = {title: draw(run_folder) for title, draw in SERVING.items()}
    return [
        Plot(title, save_plot(run_folder, file_name(f"serving/{title}"), figure), broad=True)
        for title, figure in figures.items()
        if figure is not None
    ]


def file_name(key: str) -> str:
    """Turn the key of a metric into a file name."""
    return re.sub(r"[^A-Za-z0-9._-]", "-", key.replace("@", "-at-"))
