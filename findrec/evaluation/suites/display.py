"""Output of a robustness suite: a table for the terminal, and a plot with intervals."""

from __future__ import annotations

from matplotlib.figure import Figure
from rich.table import Table
from rich.text import Text

from findrec.evaluation.display.plots import COLOURS, GREY, add_legend, new_figure
from findrec.evaluation.suites.suites import METRICS, Point, Suite
from findrec.progress import Console

_AXIS = {
    "noise": "% of the items with another item's features",
    "missing": "% of the items without features, modality by modality",
    "length": "latest events of a history",
}
TITLES = {"noise": "Wrong features", "missing": "Missing features", "length": "Short histories"}


def format_suite(suite: Suite) -> Table:
    """A rich table with one row per model and level, and changes from the reference with intervals."""
    caption = (
        f"{suite_note(suite)}\nchange: from the row marked with *, whose inputs are those of the plain "
        "evaluation; bold: significant after Holm's correction"
    )
    table = Table(title=f"{TITLES[suite.kind]}: {suite.run}", caption=caption, caption_justify="left")
    table.add_column("model")
    table.add_column("level", justify="right")
    for name in METRICS:
        table.add_column(name, justify="right")
        table.add_column("change", justify="right")
    for curve in suite.curves:
        for lead in curve.of(METRICS[0]):
            row = [point for point in curve.points if point.level == lead.level]
            mark = "*" if lead.level == curve.reference else " "
            cells = [Text(curve.model), Text(f"{level_name(suite, lead.level)}{mark}")]
            for point in row:
                cells.append(Text(f"{point.value:.4f}"))
                real = point.p < 1 - suite.confidence
                cells.append(Text("") if lead.level == curve.reference else _change(point, real))
            table.add_row(*cells)
        table.add_section()
    return table


def suite_note(suite: Suite) -> str:
    """Describe the protocol of a suite."""
    draws = f"{suite.draws} draws of the items averaged; " if suite.draws > 1 else ""
    return (
        f"{suite.split}: {suite.protocol}. {_AXIS[suite.kind]}; {draws}{suite.confidence:.0%} intervals over "
        f"{suite.users:,} users ({suite.resamples:,} paired resamples)"
    )


def level_name(suite: Suite, level: int) -> str:
    """Format a level with its unit."""
    return f"{level:,}" if suite.kind == "length" else f"{level} %"


def _change(point: Point, real: bool) -> Text:
    text = f"{point.change:+.4f} [{point.change_low:+.4f}, {point.change_high:+.4f}]"
    return Text(text, style="bold" if real else "")


def print_suite(suite: Suite) -> None:
    """Print the table to standard output."""
    Console(width=None if Console().is_terminal else 160).print(format_suite(suite))


def suite_figure(suite: Suite) -> Figure:
    """Plot NDCG@10 and recall@10 over the levels, with intervals."""
    figure, panels = new_figure(2, height=3.1)
    for axes, metric in zip(panels, METRICS, strict=False):
        for number, curve in enumerate(suite.curves):
            points, colour = curve.of(metric), COLOURS[number % len(COLOURS)]
            levels = [point.level for point in points]
            axes.plot(levels, [p.value for p in points], "o-", color=colour, markersize=3, label=curve.model)
            low, high = [p.low for p in points], [p.high for p in points]
            axes.fill_between(levels, low, high, color=colour, alpha=0.15, linewidth=0)
        if suite.kind == "length":
            axes.set_xscale("log")
            shown = sorted({point.level for curve in suite.curves for point in curve.points})
            axes.set_xticks(shown, [f"{level}" for level in shown], rotation=45, fontsize="small")
            axes.minorticks_off()
        axes.set_ylim(bottom=0)
        axes.set_xlabel(_AXIS[suite.kind], color=GREY)
        axes.set_title(metric, color=GREY, fontsize="medium")
    add_legend(figure, panels[0])
    return figure
