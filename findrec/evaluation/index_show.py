"""The curve of a run's indexes for eyes and programs: a table, two pictures, and JSON with a line for each
setting, which the pictures can be drawn from again.
"""

from __future__ import annotations

import io
import json
import os
from collections.abc import Sequence
from dataclasses import asdict, fields
from pathlib import Path
from typing import Any

import matplotlib as mpl
from matplotlib.figure import Figure
from rich.console import Console
from rich.table import Table

from findrec.bench.rows import machine
from findrec.errors import FindRecError
from findrec.evaluation.index_curve import EXACT, IndexCurve, Point

CURVE = "curve.jsonl"  # in a run's folder of indexes
_COLOURS = ("#1c938b", "#c95e2a", "#5b6bb5", "#b5489a", "#8a8f1f", "#4d9a3f")


def format_curve(curve: IndexCurve) -> Table:
    """A rich table: a line for each setting, `*` for the one that is noted to be served."""
    caption = (
        f"{curve.users:,} test users, lists of {curve.k} of {curve.items:,} items, width {curve.dim}, "
        f"{_place(curve)}; the model's own time is not counted\n"
        f"{curve.protocol}\n"
        "made exactly: lists the index could not fill, all items scored; *: noted to be served"
    )
    table = Table(
        title=f"{curve.run}: {curve.model} at {curve.checkpoint}", caption=caption, caption_justify="left"
    )
    table.add_column("index")
    table.add_column("setting")
    for name in (
        f"recall@{curve.k}",
        "queries/s",
        "p50 ms",
        "p99 ms",
        "index MiB",
        "build s",
        "made exactly",
    ):
        table.add_column(name, justify="right")
    last = None
    for point in curve.points:
        if last is not None and point.factory != last:
            table.add_section()
        last = point.factory
        served = " *" if point.served else ""
        known = point.factory != EXACT
        table.add_row(
            point.factory.replace("[", r"\["),
            f"{point.setting}{served}",
            f"{point.recall:.4f}",
            f"{point.queries_per_s:,.0f}",
            f"{point.p50_ms:.3f}",
            f"{point.p99_ms:.3f}",
            f"{point.index_bytes / 2**20:,.1f}",
            f"{point.build_s:,.2f}" if known else "–",
            f"{point.exact_share:.1%}" if known else "–",
        )
    return table


def print_curve(curve: IndexCurve) -> None:
    """The table on standard output."""
    Console(width=None if Console().is_terminal else 140).print(format_curve(curve))


def write_curve(run_folder: Path, curve: IndexCurve, json_file: Path | None = None) -> list[Path]:
    """Write `index/curve.jsonl`, `.png` and `.svg` of a run, and the JSON lines to `json_file` too.

    Returns the paths; raises `FindRecError` where one cannot be written.
    """
    of_all = {name: value for name, value in asdict(curve).items() if name != "points"}
    here = {"machine": machine()}
    lines = [json.dumps(of_all | asdict(p) | here, allow_nan=False) + "\n" for p in curve.points]
    text = "".join(lines).encode()
    folder = run_folder / "index"
    contents: dict[Path, bytes] = {folder / CURVE: text}
    figure = _draw(curve)
    for end in ("png", "svg"):
        out = io.BytesIO()
        with mpl.rc_context({"svg.hashsalt": "findrec", "svg.fonttype": "none"}):
            figure.savefig(out, format=end, dpi=110, metadata={"Date": None} if end == "svg" else None)
        contents[folder / f"curve.{end}"] = out.getvalue()
    if json_file is not None:
        contents[json_file] = text
    for path, content in contents.items():
        temporary = path.with_name(f".{path.name}.{os.getpid()}")
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            temporary.write_bytes(content)
            temporary.replace(path)
        except OSError as error:
            temporary.unlink(missing_ok=True)
            raise FindRecError(f"cannot write {path}: {error.strerror or error}") from error
    return list(contents)


def read_curve(run_folder: Path) -> IndexCurve | None:
    """What `write_curve` saved of a run; None where it has measured no index, or not as this version does."""
    of_point = {field.name for field in fields(Point)}
    of_all = {field.name for field in fields(IndexCurve)} - {"points"}
    try:
        text = (run_folder / "index" / CURVE).read_text(encoding="utf-8")
        lines = [json.loads(line) for line in text.splitlines()]
        points = [Point(**{name: line[name] for name in of_point}) for line in lines]
        return IndexCurve(**{name: lines[0][name] for name in of_all}, points=points)
    except (OSError, ValueError, LookupError, TypeError):
        return None


def index_curve_figure(run_folder: Path) -> Figure | None:
    """The picture of a run's index curve as `findrec index` measured it; None where it has not."""
    curve = read_curve(run_folder)
    return None if curve is None else _draw(curve)


def _draw(curve: IndexCurve) -> Figure:
    """Rate and latency of each setting over its recall."""
    figure = Figure(figsize=(10.5, 4.4), layout="constrained")
    rate, latency = figure.subplots(1, 2)
    groups = {p.factory: [q for q in curve.points if q.factory == p.factory] for p in curve.points}
    for place, (factory, points) in enumerate(groups.items()):
        colour = "#7d8791" if factory == EXACT else _COLOURS[place % len(_COLOURS)]
        label = f"{factory}, {points[0].index_bytes / 2**20:,.1f} MiB"
        _line(rate, points, [p.queries_per_s for p in points], colour, label)
        _line(latency, points, [p.p50_ms for p in points], colour, label)
        ends = [[getattr(p, name) for p in points] for name in ("recall", "p50_ms", "p99_ms")]
        latency.vlines(*ends, color=colour, alpha=0.3, linewidth=3)
    rate.set_ylabel(f"queries/s, {_place(curve)}")
    latency.set_ylabel("latency of one query (ms): median, up to p99")
    for axes in (rate, latency):
        axes.set_xlabel(f"recall@{curve.k} against exact search")
        axes.set_yscale("log")
        axes.grid(alpha=0.25, which="both")
    rate.legend(fontsize=8)
    figure.suptitle(f"{curve.run}: {curve.items:,} items, width {curve.dim}", parse_math=False)
    return figure


def _place(curve: IndexCurve) -> str:
    threads = f"{curve.threads} thread{'s' if curve.threads > 1 else ''}"
    return threads if curve.gpus == "none" else f"{threads}, all GPUs ({curve.gpus})"


def _line(axes: Any, points: Sequence[Point], values: Sequence[float], colour: str, label: str) -> None:
    axes.plot(
        *([p.recall for p in points], values),
        color=colour,
        marker="o" if len(points) > 1 else "s",
        markersize=4,
        linewidth=1.4,
        label=label,
    )
    for point, value in zip(points, values, strict=True):
        if point.setting:
            axes.annotate(
                point.setting.split("=")[-1] if "," not in point.setting else point.setting,
                *((point.recall, value),),
                textcoords="offset points",
                xytext=(4, 3),
                fontsize=7,
                color=colour,
            )
