"""Show and write the statistics of `findrec stats`, and find the data set by its name."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from pathlib import Path

from rich import box
from rich.table import Table

from findrec.config import DataConfig
from findrec.datasets.folder.data_folder import DataFolder
from findrec.datasets.folder.remote import is_remote
from findrec.datasets.prepare.pipeline import open_or_prepare
from findrec.datasets.stats.statistics import Stats
from findrec.errors import FindRecError
from findrec.paths import data_folder_candidates, find_data_folder
from findrec.progress import Console


def open_data(name: str) -> DataFolder:
    """Open a data set given as a folder, a URL, a folder in `data/`, or a recipe (prepared if necessary)."""
    if is_remote(name):
        return DataFolder.open(name, verify=False)
    if Path(name).suffix != ".yaml" and any(path.is_dir() for path in data_folder_candidates(name)):
        return DataFolder.open(find_data_folder(name), verify=False)
    return open_or_prepare(DataConfig(recipe=name))


def format_value(value: float | None) -> str:
    """Format a count with separators, a share or mean with three digits, NaN and None as a dash."""
    if value is None or math.isnan(value):
        return "-"
    if float(value).is_integer() and abs(value) >= 1:
        return f"{int(value):,}"
    return f"{value:,.1f}" if abs(value) >= 100 else f"{value:.3g}"


def stats_table(stats: Stats, targets: Mapping[str, float]) -> Table:
    """Table of all statistics, next to those of the real data in `targets`, if any."""
    table = Table(box=box.SIMPLE_HEAD)
    table.add_column("")
    table.add_column("measured", justify="right")
    if targets:
        table.add_column("real data", justify="right")

    def row(label: str, value: float, target: float | None = None) -> None:
        table.add_row(label, format_value(value), *([format_value(target)] if targets else []))

    for name, field in Stats.model_fields.items():
        if field.title is not None:
            row(field.title, getattr(stats, name), targets.get(name))
    for modality, share in stats.present_items.items():
        row(f"items with {modality}", share)
        row("  events on them", stats.present_events[modality])
    return table


def print_stats(stats: Stats, targets: Mapping[str, float]) -> None:
    """Print the overview and the table of statistics."""
    for line in stats.overview.lines():
        print(line)
    Console().print(stats_table(stats, targets))


def write_stats(stats: Stats, path: Path) -> None:
    """Write the statistics as JSON; NaN becomes null."""
    values = stats.model_dump().items()
    plain = {k: None if isinstance(v, float) and math.isnan(v) else v for k, v in values}
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(plain, indent=1) + "\n", encoding="utf-8")
    except OSError as error:
        raise FindRecError(f"cannot write {path}: {error.strerror or error}") from error
