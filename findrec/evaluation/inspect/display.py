"""Output of `findrec inspect`: tables for the terminal, and an HTML page and a plot in `inspect/` of the run.

The page works offline and has no scripts. Gates are coloured on a fixed scale from 0 to 1, contributions
relative to the largest on the page.
"""

from __future__ import annotations

import hashlib
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any
from urllib.parse import quote

import numpy as np
from matplotlib.figure import Figure
from rich import box
from rich.console import Group
from rich.table import Table
from rich.text import Text

from findrec.evaluation.display.page import write_page
from findrec.evaluation.display.plots import curve_figure, data_uri, svg_of
from findrec.evaluation.display.wording import format_number
from findrec.evaluation.inspect.inspect import Floats, Inspection
from findrec.files import replacing
from findrec.progress import Console

_TITLE = 34  # characters of a title in the terminal and the picture
_LABELLED = 60  # maximum number of labelled rows in the plot
_LONGEST_NAME = 100
_LEFT_OUT_FIRST = ("time", "heads", "part", "log p", "expert", "gain", "followed by")
_TEAL, _RUST = (28, 147, 139), (201, 94, 42)  # positive and negative contributions


def format_inspection(inspection: Inspection, width: int = 200) -> Group:
    """Rich tables of the positions, a summary, and the alignment before and after training.

    Columns of the positions that do not fit into `width` characters are left out, as the caption says.
    """
    parts: list[Any] = [_fitting_positions(inspection, width), Text()]
    parts += [Text(f"{name}: {value}") for name, value in summary(inspection)]
    if inspection.alignment:
        parts += [Text(), _alignment(inspection)]
    return Group(*parts)


def print_inspection(inspection: Inspection) -> None:
    """Print the tables, in a terminal within its width."""
    width = Console().width if Console().is_terminal else 180
    Console(width=width).print(format_inspection(inspection, width))


def _fitting_positions(inspection: Inspection, width: int) -> Table:
    console = Console(width=10_000)
    for count in range(len(_LEFT_OUT_FIRST) + 1):
        table = _positions(inspection, _LEFT_OUT_FIRST[:count])
        if console.measure(table).minimum <= width:
            break
    return table


def summary(inspection: Inspection) -> list[tuple[str, str]]:
    """Averages over all positions, as pairs of a name and a sentence."""
    _, heads, experts = inspection.gates_THE.shape
    means = zip(inspection.experts, inspection.mean_gates.mean(0), strict=True)
    gates = ", ".join(f"{name} {value:.3f}" for name, value in means)
    lines = [
        ("log-probability of the next item", f"{inspection.log_probability_T.mean():+.3f} nats on average"),
        (
            "gate entropy",
            f"{inspection.entropy.mean():.3f} nats; uniform gates have {np.log(experts):.3f} "
            f"({heads} {'heads' if heads > 1 else 'head'}, mean gates: {gates})",
        ),
        ("gates shuffled", _shuffled(inspection)),
    ]
    for c, name in enumerate(inspection.columns):
        change, gain = inspection.change_TC[:, c].mean(), inspection.gain_TC[:, c]
        text = (
            f"user vectors move by {change:.1%}, log-probability changes by {-gain.mean():+.4f} (worse at "
            f"{np.mean(gain > 0):.0%} of the positions)"
        )
        lines.append((f"without {name}", text))
    return lines


def write_inspection(run_folder: Path, inspection: Inspection) -> tuple[Path, Path]:
    """Write `inspect/<user>.html` and `.png` below the run folder; returns their paths."""
    folder = run_folder / "inspect"
    folder.mkdir(exist_ok=True)
    page, picture = (folder / f"{file_name(inspection.user)}{end}" for end in (".html", ".png"))
    _write_page(page, run_folder.name, inspection)
    with replacing(picture) as part, warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Glyph")  # titles in letters the font lacks show as boxes
        draw_inspection(inspection).savefig(part, format="png", dpi=110)
    return page, picture


def file_name(user: str) -> str:
    """A safe, unique file name for a raw user id."""
    name = quote(user, safe="")
    if 0 < len(name) <= _LONGEST_NAME and not name.startswith("."):
        return name
    return f"{name[:_LONGEST_NAME].lstrip('.')}-{hashlib.blake2b(user.encode(), digest_size=6).hexdigest()}"


def _shuffled(inspection: Inspection) -> str:
    if inspection.shuffled_gain is None or inspection.shuffled_change is None:
        return "not measured (no router, or a single position)"
    return (
        f"user vectors move by {inspection.shuffled_change:.2%}, log-probability changes by "
        f"{-inspection.shuffled_gain:+.5f} (near 0 if the gates carry no information)"
    )


def _positions(inspection: Inspection, left_out: Sequence[str] = ()) -> Table:
    table = Table(title=Text(f"user {plain(inspection.user)}"), caption_justify="left", box=box.SIMPLE_HEAD)
    table.collapse_padding = True
    caption = (
        "expert: the one with the largest gate, mean over heads; heads: the number of that of each head. "
        "Modalities: relative change of the user vector without the modality "
        "and gain in log-probability of the next item; the largest change is underlined. The training part "
        "was trained on."
    )
    if left_out:
        caption += f" Left out in this narrow terminal, but in the page: {', '.join(left_out)}."
    table.caption = Text(caption)
    for name in ("#", "time", "item", "followed by", "part"):
        wraps = name in ("item", "followed by")  # only titles wrap in a narrow terminal
        if name not in left_out:
            table.add_column(name, no_wrap=not wraps, min_width=12 if wraps else None)
    for name in ("rank", "log p", "expert", "heads"):
        if name not in left_out:
            table.add_column(name, justify="right", no_wrap=True)
    for name in inspection.columns:
        table.add_column(Text(name), justify="right", no_wrap="gain" not in left_out)
    single = [c for c, name in enumerate(inspection.columns) if name in inspection.modalities]
    for t, step in enumerate(inspection.steps):
        best = int(inspection.mean_gates[t].argmax())
        most = max(single, key=lambda c: float(inspection.change_TC[t, c]))
        cells: dict[str, Text | str] = {
            "#": str(step.position),
            "time": step.time,
            "item": Text(shorten(step.item)),
            "followed by": Text(shorten(step.followed)),
            "part": step.part,
            "rank": f"{inspection.rank_T[t]:g}",
            "log p": f"{inspection.log_probability_T[t]:.2f}",
            "expert": Text(f"{inspection.experts[best]} ({inspection.mean_gates[t, best]:.2f})"),
            "heads": " ".join(str(e + 1) for e in inspection.gates_THE[t].argmax(1)),
        }
        contributions = []
        for c in range(len(inspection.columns)):
            gain = "" if "gain" in left_out else f" {inspection.gain_TC[t, c]:+.2f}"
            style = "underline" if c == most and len(single) > 1 else ""
            contributions.append(Text(f"{inspection.change_TC[t, c]:.2f}{gain}", style=style))
        table.add_row(*(cell for name, cell in cells.items() if name not in left_out), *contributions)
    return table


def _alignment(inspection: Inspection) -> Table:
    table = Table(title="alignment to the ID stream over training", pad_edge=False)
    table.add_column("measurement")
    for name in ("first step", "before", "last step", "after"):
        table.add_column(name, justify="right")
    for curve in inspection.alignment:
        first, last = format_number(curve.values[0]), format_number(curve.values[-1])
        table.add_row(Text(curve.name), str(curve.steps[0]), first, str(curve.steps[-1]), last)
    return table


def plain(text: str) -> str:
    """Replace line breaks and control characters in text from the data by spaces."""
    return "".join(letter if letter.isprintable() else " " for letter in text)


def shorten(text: str) -> str:
    """Shorten a text to one line of at most `_TITLE` characters."""
    text = plain(text)
    return text if len(text) <= _TITLE else text[: _TITLE - 1] + "…"


def _write_page(path: Path, run: str, inspection: Inspection) -> None:
    largest_change, largest_gain = inspection.change_TC.max(), np.abs(inspection.gain_TC).max()
    rows = []
    for t, step in enumerate(inspection.steps):
        contributions = []
        for change, gain in zip(inspection.change_TC[t], inspection.gain_TC[t], strict=True):
            contributions.append(_cell(f"{change:.3f}", change, largest_change))
            contributions.append(_cell(f"{gain:+.3f}", gain, largest_gain))
        rows.append(
            {
                "step": step,
                "rank": f"{inspection.rank_T[t]:g}",
                "log_probability": f"{inspection.log_probability_T[t]:.3f}",
                "expert": inspection.experts[int(inspection.mean_gates[t].argmax())],
                "entropy": f"{inspection.entropy[t]:.3f}",
                "heads": [
                    [_cell(f"{gate:.2f}", gate, 1.0) for gate in row] for row in inspection.gates_THE[t]
                ],
                "contributions": contributions,
            }
        )
    curves = [
        {
            "name": curve.name,
            "meaning": curve.meaning,
            "first": format_number(curve.values[0]),
            "last": format_number(curve.values[-1]),
            "svg": data_uri(svg_of(curve_figure(curve.steps, curve.values)), "image/svg+xml"),
        }
        for curve in inspection.alignment
    ]
    write_page(
        path,
        "inspect/inspect.html.j2",
        run=run,
        user=inspection.user,
        heads=inspection.gates_THE.shape[1],
        experts=inspection.experts,
        columns=inspection.columns,
        summary=summary(inspection),
        rows=rows,
        curves=curves,
    )


def _cell(text: str, value: float, full: float) -> dict[str, str]:
    strength = min(1.0, abs(value) / full) if full > 0 else 0.0
    red, green, blue = _TEAL if value >= 0 else _RUST
    return {"text": text, "colour": f"rgba({red}, {green}, {blue}, {0.75 * strength:.3f})"}


def draw_inspection(inspection: Inspection) -> Figure:
    """Draw heat maps of gates, changes and gains, one row per position."""
    num_steps, heads, experts = inspection.gates_THE.shape
    widths = [heads * experts, max(3, 2 * len(inspection.columns)), max(3, 2 * len(inspection.columns))]
    figure = Figure(figsize=(6.5 + 0.22 * sum(widths), 2.2 + 0.22 * min(num_steps, 4 * _LABELLED)))
    figure.set_layout_engine("constrained")
    first, second, third = figure.subplots(1, 3, width_ratios=widths)
    bound = max(float(np.abs(inspection.gain_TC).max()), 1e-9)
    _heatmap(first, inspection.gates_THE.reshape(num_steps, -1), "viridis", (0.0, 1.0), "gates, head by head")
    first.set_xlabel("head", fontsize=8)
    first.set_xticks([experts * h + (experts - 1) / 2 for h in range(heads)], range(1, heads + 1))
    for h in range(1, heads):
        first.axvline(experts * h - 0.5, color="white", linewidth=1.5)
    largest = max(float(inspection.change_TC.max()), 1e-9)
    _heatmap(second, inspection.change_TC, "viridis", (0.0, largest), "vector moves\nwithout")
    _heatmap(third, inspection.gain_TC, "RdBu", (-bound, bound), "gain in\nlog-probability")
    for axes in (second, third):
        _name(axes.xaxis, inspection.columns, rotation=30, ha="right")
    if num_steps <= _LABELLED:
        _name(first.yaxis, [f"{shorten(step.item)}  {step.position}" for step in inspection.steps])
    for axes in (second, third):
        axes.set_yticks([])
    return figure


def _heatmap(axes: Any, values: Floats, colours: str, limits: tuple[float, float], title: str) -> None:
    image = axes.imshow(values, aspect="auto", cmap=colours, vmin=limits[0], vmax=limits[1])
    axes.set_title(title, fontsize=9)
    axes.tick_params(labelsize=7)
    axes.figure.colorbar(image, ax=axes, location="bottom", fraction=0.04).ax.tick_params(labelsize=7)


def _name(axis: Any, names: Sequence[str], **looks: Any) -> None:
    axis.set_ticks(range(len(names)), names, parse_math=False, **looks)  # titles may contain $ signs
