"""Style and storage of plots: one palette that is readable on white and on black."""

from __future__ import annotations

import base64
import io
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import matplotlib as mpl
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from findrec.files import replacing

GREY = "#7d8791"
COLOURS = ("#1c938b", "#c95e2a", "#5b6bb5", "#b5489a", "#8a8f1f", "#4d9a3f")
PLOTS = "plots"  # subfolder of a run folder


def new_figure(panels: int = 1, *, width: float = 4.6, height: float = 2.5) -> tuple[Figure, list[Any]]:
    """A styled figure of `panels` axes side by side, each `width` x `height` inches."""
    figure = Figure(figsize=(width * panels, height), layout="constrained")
    panel_axes = list(figure.subplots(1, panels, squeeze=False)[0])
    for axes in panel_axes:
        make_grey(axes)
        axes.grid(alpha=0.25, color=GREY)
    return figure, panel_axes


def make_grey(axes: Any) -> None:
    """Draw text and frame of a plot in a grey that is readable on any background."""
    axes.tick_params(colors=GREY)
    for text in (axes.xaxis.label, axes.yaxis.label, axes.title):
        text.set_color(GREY)
    for side, spine in axes.spines.items():
        spine.set_visible(side in ("left", "bottom"))
        spine.set_color(GREY)


def add_legend(figure: Figure, axes: Any) -> None:
    """Add a legend below all panels if there is more than one line."""
    handles, names = axes.get_legend_handles_labels()
    if len(names) > 1:
        figure.legend(
            handles,
            names,
            loc="outside lower center",
            ncols=min(4, len(names)),
            frameon=False,
            labelcolor=GREY,
            fontsize="small",
        )


def curve_figure(steps: Sequence[float], values: Sequence[float]) -> Figure:
    """Plot one curve over training steps."""
    figure, (axes,) = new_figure()
    marker = "o" if len(steps) < 40 else None
    axes.plot(steps, values, color=COLOURS[0], linewidth=1.6, marker=marker, markersize=3)
    axes.set_xlabel("step", color=GREY)
    axes.xaxis.set_major_locator(MaxNLocator(integer=True, nbins=6))
    return figure


def svg_of(figure: Figure) -> bytes:
    """SVG with a transparent background; equal figures give equal bytes."""
    out = io.BytesIO()
    with mpl.rc_context({"svg.hashsalt": "findrec", "svg.fonttype": "none"}):
        figure.savefig(out, format="svg", transparent=True, metadata={"Date": None})
    return out.getvalue()


def data_uri(content: bytes, kind: str) -> str:
    """Encode content as a `data:` URI of the media type `kind`."""
    return f"data:{kind};base64,{base64.b64encode(content).decode()}"


def save_plot(run_folder: Path, name: str, figure: Figure) -> str:
    """Write `plots/<name>.svg` and `.png` in the run folder; returns the SVG for a page (`data_uri`)."""
    folder = run_folder / PLOTS
    folder.mkdir(exist_ok=True)
    svg, png = svg_of(figure), io.BytesIO()
    figure.set_layout_engine("none")  # keeps the layout of the SVG: computing it takes half of the time
    figure.savefig(png, format="png", dpi=150, facecolor="white", metadata={"Software": None})
    for content, end in ((svg, "svg"), (png.getvalue(), "png")):
        with replacing(folder / f"{name}.{end}") as part:
            part.write_bytes(content)
    return data_uri(svg, "image/svg+xml")
