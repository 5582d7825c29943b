"""Output of `findrec index`: a table, two plots, and JSON lines from which the plots can be redrawn."""

from __future__ import annotations

import io
import json
from collections.abc import Sequence
from dataclasses import asdict, fields
from pathlib import Path
from typing import Any

import matplotlib as mpl
from matplotlib.figure import Figure
from rich.table import Table

from findrec.environment import machine
from findrec.errors import FindRecError
from findrec.evaluation.display.plots import COLOURS, GREY
from findrec.evaluation.index.curve import EXACT, SERVED_RECALL, IndexCurve, Point
from findrec.files import replacing
from findrec.progress import Console

CURVE = "curve.jsonl"  # in the `index` folder of a run


def format_curve(curve: IndexCurve) -> Table:
    """A rich table with one row per setting; `*` marks the setting to be served."""
    caption = (
        f"{curve.users:,} test users, lists of {curve.k} of {curve.items:,} items, width {curve.dim}, "
        f"{_hardware(curve)}; the model's own time is not included\n"
        f"{curve.protocol}\n"
        "exact: share of lists that the index could not fill, made by exact search; *: setting to be served"
    )
    table = Table(
        title=f"{curve.run}: {curve.model} at {curve.checkpoint}", caption=caption, caption_justify="left"
    )
    table.add_column("index")
    table.add_column("setting")
    for name in (f"recall@{curve.k}", "queries/s", "p50 ms", "p99 ms", "index MiB", "build s", "exact"):
        table.add_column(name, justify="right")
    last = None
    for point in curve.points:
        if last is not None and point.factory != last:
            table.add_section()
        last = point.factory
        served = " *" if point.served else ""
        is_index = point.factory != EXACT
        table.add_row(
            point.factory.replace("[", r"\["),
            f"{point.setting}{served}",
            f"{point.recall:.4f}",
            f"{point.queries_per_s:,.0f}",
            f"{point.p50_ms:.3f}",
            f"{point.p99_ms:.3f}",
            f"{point.index_bytes / 2**20:,.1f}",
            f"{point.build_s:,.2f}" if is_index else "–",
            f"{point.exact_share:.1%}" if is_index else "–",
        )
    return table


def advise(curve: IndexCurve) -> str:
    """Whether one of the indexes is worth using instead of exact search, which needs none."""
    exact = next(point for point in curve.points if point.factory == EXACT)
    served = [point for point in curve.points if point.served and point.recall >= SERVED_RECALL]
    if not served:
        return f"No index has a recall of {SERVED_RECALL}: search exactly (leave out --index)."
    fastest = max(served, key=lambda point: point.queries_per_s)
    times = fastest.queries_per_s / exact.queries_per_s
    if times <= 1:
        return (
            f"Exact search is faster than the fastest index with a recall of {SERVED_RECALL} "
            f"({exact.queries_per_s:,.0f} against {fastest.queries_per_s:,.0f} queries/s): {curve.items:,} "
            "items need no index (leave out --index)."
        )
    return (
        f"{fastest.factory} answers {times:,.1f} times as many queries as exact search with a recall of "
        f"{fastest.recall:.4f}: findrec recommend {curve.run} --index {fastest.factory}"
    )


def print_curve(curve: IndexCurve) -> None:
    """Print the table and the advice to standard output."""
    console = Console(width=None if Console().is_terminal else 140)
    console.print(format_curve(curve))
    console.print(advise(curve), markup=False, highlight=False, soft_wrap=True)


def write_curve(run_folder: Path, curve: IndexCurve, json_file: Path | None = None) -> list[Path]:
    """Write `index/curve.jsonl`, `.png` and `.svg` of a run, and the JSON lines also to `json_file`.

    Returns the paths; raises `FindRecError` if one cannot be written.
    """
    shared = {name: value for name, value in asdict(curve).items() if name != "points"}
    host = {"machine": machine()}
    lines = [json.dumps(shared | asdict(p) | host, allow_nan=False) + "\n" for p in curve.points]
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
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            with replacing(path) as part:
                part.write_bytes(content)
        except OSError as error:
            raise FindRecError(f"cannot write {path}: {error.strerror or error}") from error
    return list(contents)


def read_curve(run_folder: Path) -> IndexCurve | None:
    """The curve that `write_curve` saved for a run; None if there is none, or one of another format."""
    point_fields = {field.name for field in fields(Point)}
    shared_fields = {field.name for field in fields(IndexCurve)} - {"points"}
    try:
        text = (run_folder / "index" / CURVE).read_text(encoding="utf-8")
        lines = [json.loads(line) for line in text.splitlines()]
        points = [Point(**{name: line[name] for name in point_fields}) for line in lines]
        return IndexCurve(**{name: lines[0][name] for name in shared_fields}, points=points)
    except (OSError, ValueError, LookupError, TypeError):
        return None


def index_curve_figure(run_folder: Path) -> Figure | None:
    """The plots of the curve that `findrec index` measured for a run; None if there is none."""
    curve = read_curve(run_folder)
    return None if curve is None else _draw(curve)


def _draw(curve: IndexCurve) -> Figure:
    """Plot rate and latency of each setting over its recall."""
    figure = Figure(figsize=(10.5, 4.4), layout="constrained")
    rate, latency = figure.subplots(1, 2)
    groups = {p.factory: [q for q in curve.points if q.factory == p.factory] for p in curve.points}
    for n, (factory, points) in enumerate(groups.items()):
        colour = GREY if factory == EXACT else COLOURS[n % len(COLOURS)]
        label = f"{factory}, {points[0].index_bytes / 2**20:,.1f} MiB"
        _line(rate, points, [p.queries_per_s for p in points], colour, label)
        _line(latency, points, [p.p50_ms for p in points], colour, label)
        ends = [[getattr(p, name) for p in points] for name in ("recall", "p50_ms", "p99_ms")]
        latency.vlines(*ends, color=colour, alpha=0.3, linewidth=3)
    rate.set_ylabel(f"queries/s, {_hardware(curve)}")
    latency.set_ylabel("latency of one query (ms): median, up to p99")
    for axes in (rate, latency):
        axes.set_xlabel(f"recall@{curve.k} against exact search")
        axes.set_yscale("log")
        axes.grid(alpha=0.25, which="both")
    rate.legend(fontsize=8)
    figure.suptitle(f"{curve.run}: {curve.items:,} items, width {curve.dim}", parse_math=False)
    return figure


def _hardware(curve: IndexCurve) -> str:
    threads = f"{curve.threads} thread{'s' if curve.threads > 1 else ''}"
    return threads if curve.gpus == "none" else f"{threads}, all GPUs ({curve.gpus})"


def _line(axes: Any, points: Sequence[Point], values: Sequence[float], colour: str, label: str) -> None:
    axes.plot(
        [p.recall for p in points],
        values,
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
                (point.recall, value),
                textcoords="offset points",
                xytext=(4, 3),
                fontsize=7,
                color=colour,
            )
