"""An inspection for eyes: tables for a terminal, and a page and a picture in the run folder's `inspect/`.

The page needs no network and no script. Gates are coloured on the fixed scale from 0 to 1, so that even
gates look even; contributions by the largest of the page.
"""

from __future__ import annotations

import hashlib
import os
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any
from urllib.parse import quote

import numpy as np
from matplotlib.figure import Figure
from rich import box
from rich.console import Console, Group
from rich.table import Table
from rich.text import Text

from findrec.evaluation.inspect import Floats, Inspection
from findrec.evaluation.inspect_template import TEMPLATE
from findrec.evaluation.page import write_page
from findrec.evaluation.plots import curve_figure, data_uri, svg_of
from findrec.evaluation.report import format_number

_TITLE = 34  # characters of a title in the terminal and the picture
_LABELLED = 60  # rows a picture has room to name
_LONGEST_NAME = 100
_TEAL, _RUST = (28, 147, 139), (201, 94, 42)  # worked for and against what followed


def format_inspection(found: Inspection) -> Group:
    """Rich tables: the positions, what they add up to, and the alignment before and after training."""
    parts: list[Any] = [_positions(found), Text()]
    parts += [Text(f"{name}: {value}") for name, value in summary(found)]
    if found.alignment:
        parts += [Text(), _alignment(found)]
    return Group(*parts)


def print_inspection(found: Inspection) -> None:
    """The tables on standard output; a terminal too narrow for the numbers wraps lines, it loses none."""
    needed = 105 + 15 * len(found.columns)
    there = Console().width if Console().is_terminal else 180
    Console(width=max(needed, there)).print(format_inspection(found))


def summary(found: Inspection) -> list[tuple[str, str]]:
    """What the history says as a whole, as pairs of a name and a sentence."""
    _, heads, experts = found.gates_THE.shape
    gates = " ".join(f"{value:.3f}" for value in found.mean_gates.mean(0))
    lines = [
        ("log-probability of what followed", f"{found.log_probability_T.mean():+.3f} nats on average"),
        (
            "gate entropy",
            f"{found.entropy.mean():.3f} nats; {np.log(experts):.3f} would be even "
            f"({heads} heads of {experts} experts, mean gates {gates})",
        ),
        ("gates shuffled", _shuffled(found)),
    ]
    for c, name in enumerate(found.columns):
        lines.append(
            (
                f"without {name}",
                f"user vectors move by {found.change_TC[:, c].mean():.1%}, log-probability changes by "
                f"{-found.gain_TC[:, c].mean():+.4f} (worse at {np.mean(found.gain_TC[:, c] > 0):.0%} of the "
                "positions)",
            )
        )
    return lines


def write_inspection(run_folder: Path, found: Inspection) -> tuple[Path, Path]:
    """Write `inspect/<user>.html` and `.png` below the run folder; returns their paths."""
    folder = run_folder / "inspect"
    folder.mkdir(exist_ok=True)
    page, picture = (folder / f"{file_name(found.user)}{end}" for end in (".html", ".png"))
    _write_page(page, run_folder.name, found)
    temporary = folder / f".{os.getpid()}.png"
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Glyph")  # titles in letters the font lacks show as boxes
        draw_inspection(found).savefig(temporary, dpi=110)
    temporary.replace(picture)
    return page, picture


def file_name(user: str) -> str:
    """A raw user id as one plain file name, different for different ids."""
    name = quote(user, safe="")
    if 0 < len(name) <= _LONGEST_NAME and not name.startswith("."):
        return name
    return f"{name[:_LONGEST_NAME].lstrip('.')}-{hashlib.blake2b(user.encode(), digest_size=6).hexdigest()}"


def _shuffled(found: Inspection) -> str:
    if found.shuffled_gain is None or found.shuffled_change is None:
        return "nothing to deal out (no router, or a single position)"
    return (
        f"user vectors move by {found.shuffled_change:.2%}, log-probability changes by "
        f"{-found.shuffled_gain:+.5f} (near 0 where gates say nothing about a position)"
    )


def _positions(found: Inspection) -> Table:
    table = Table(title=Text(f"user {plain(found.user)}"), caption_justify="left", box=box.SIMPLE_HEAD)
    table.collapse_padding = True
    table.caption = Text(
        "expert: largest mean gate over heads, and the first choice of every head (from 1; each head has its "
        "own). Of a modality: how far the user vector moves without it, and the log-probability of what "
        "followed that is owed to it; the larger mover is underlined. The training part was learnt from."
    )
    for name in ("#", "time", "item", "followed by", "part"):
        words = name in ("item", "followed by")  # in a narrow terminal these make room for the numbers
        table.add_column(name, no_wrap=not words, min_width=12 if words else None)
    for name in ("rank", "log p", "expert", "heads", *found.columns):
        table.add_column(Text(name), justify="right", no_wrap=True)
    single = [c for c, name in enumerate(found.columns) if name in found.modalities]
    for t, step in enumerate(found.steps):
        best = int(found.mean_gates[t].argmax())
        most = max(single, key=lambda c: float(found.change_TC[t, c]))
        cells = [
            Text(
                f"{found.change_TC[t, c]:.2f} {found.gain_TC[t, c]:+.2f}",
                style="underline" if c == most and len(single) > 1 else "",
            )
            for c in range(len(found.columns))
        ]
        table.add_row(
            str(step.place),
            step.time,
            Text(shorten(step.item)),
            Text(shorten(step.followed)),
            step.part,
            f"{found.rank_T[t]:g}",
            f"{found.log_probability_T[t]:.2f}",
            f"{best + 1} ({found.mean_gates[t, best]:.2f})",
            " ".join(str(e + 1) for e in found.gates_THE[t].argmax(1)),
            *cells,
        )
    return table


def _alignment(found: Inspection) -> Table:
    table = Table(title="alignment to the ID stream over training", pad_edge=False)
    table.add_column("measurement")
    for name in ("first step", "before", "last step", "after"):
        table.add_column(name, justify="right")
    for curve in found.alignment:
        first, last = format_number(curve.values[0]), format_number(curve.values[-1])
        table.add_row(Text(curve.name), str(curve.steps[0]), first, str(curve.steps[-1]), last)
    return table


def plain(text: str) -> str:
    """Text from the data without line breaks and control characters, which would steer a terminal."""
    return "".join(letter if letter.isprintable() else " " for letter in text)


def shorten(text: str) -> str:
    """One line of at most `_TITLE` characters."""
    text = plain(text)
    return text if len(text) <= _TITLE else text[: _TITLE - 1] + "…"


def _write_page(path: Path, run: str, found: Inspection) -> None:
    largest_change, largest_gain = found.change_TC.max(), np.abs(found.gain_TC).max()
    rows = []
    for t, step in enumerate(found.steps):
        contributions = []
        for change, gain in zip(found.change_TC[t], found.gain_TC[t], strict=True):
            contributions.append(_cell(f"{change:.3f}", change, largest_change))
            contributions.append(_cell(f"{gain:+.3f}", gain, largest_gain))
        rows.append(
            {
                "step": step,
                "rank": f"{found.rank_T[t]:g}",
                "log_probability": f"{found.log_probability_T[t]:.3f}",
                "expert": int(found.mean_gates[t].argmax()) + 1,
                "entropy": f"{found.entropy[t]:.3f}",
                "heads": [[_cell(f"{gate:.2f}", gate, 1.0) for gate in row] for row in found.gates_THE[t]],
                "contributions": contributions,
            }
        )
    curves = [
        {
            "name": curve.name,
            "first": format_number(curve.values[0]),
            "last": format_number(curve.values[-1]),
            "svg": data_uri(svg_of(curve_figure(curve.steps, curve.values)), "image/svg+xml"),
        }
        for curve in found.alignment
    ]
    write_page(
        path,
        TEMPLATE,
        run=run,
        user=found.user,
        heads=found.gates_THE.shape[1],
        experts=found.gates_THE.shape[2],
        columns=found.columns,
        summary=summary(found),
        rows=rows,
        curves=curves,
    )


def _cell(text: str, value: float, full: float) -> dict[str, str]:
    strength = min(1.0, abs(value) / full) if full > 0 else 0.0
    red, green, blue = _TEAL if value >= 0 else _RUST
    return {"text": text, "colour": f"rgba({red}, {green}, {blue}, {0.75 * strength:.3f})"}


def draw_inspection(found: Inspection) -> Figure:
    """Three heat maps side by side, one line for each position: gates, changes, gains."""
    num_steps, heads, experts = found.gates_THE.shape
    widths = [heads * experts, max(3, 2 * len(found.columns)), max(3, 2 * len(found.columns))]
    figure = Figure(figsize=(6.5 + 0.22 * sum(widths), 2.2 + 0.22 * min(num_steps, 4 * _LABELLED)))
    figure.set_layout_engine("constrained")
    first, second, third = figure.subplots(1, 3, width_ratios=widths)
    bound = max(float(np.abs(found.gain_TC).max()), 1e-9)
    _heatmap(first, found.gates_THE.reshape(num_steps, -1), "viridis", (0.0, 1.0), "gates, head by head")
    first.set_xlabel("head", fontsize=8)
    first.set_xticks([experts * h + (experts - 1) / 2 for h in range(heads)], range(1, heads + 1))
    for h in range(1, heads):
        first.axvline(experts * h - 0.5, color="white", linewidth=1.5)
    largest = max(float(found.change_TC.max()), 1e-9)
    _heatmap(second, found.change_TC, "viridis", (0.0, largest), "vector moves\nwithout")
    _heatmap(third, found.gain_TC, "RdBu", (-bound, bound), "log-probability\nowed to")
    for axes in (second, third):
        _name(axes.xaxis, found.columns, rotation=30, ha="right")
    if num_steps <= _LABELLED:
        _name(first.yaxis, [f"{shorten(step.item)}  {step.place}" for step in found.steps])
    for axes in (second, third):
        axes.set_yticks([])
    return figure


def _heatmap(axes: Any, values: Floats, colours: str, limits: tuple[float, float], title: str) -> None:
    image = axes.imshow(values, aspect="auto", cmap=colours, vmin=limits[0], vmax=limits[1])
    axes.set_title(title, fontsize=9)
    axes.tick_params(labelsize=7)
    axes.figure.colorbar(image, ax=axes, location="bottom", fraction=0.04).ax.tick_params(labelsize=7)


def _name(axis: Any, names: Sequence[str], **looks: Any) -> None:
    axis.set_ticks(range(len(names)), names, parse_math=False, **looks)  # a title with two $ is no formula
