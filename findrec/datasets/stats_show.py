"""What `findrec stats` shows and writes, and how it finds the data set that is meant."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from pathlib import Path

from rich import box
from rich.console import Console
from rich.table import Table

from findrec.config import DataConfig
from findrec.datasets.folder import DataFolder
from findrec.datasets.prepare import open_or_prepare
from findrec.datasets.remote import is_remote
from findrec.datasets.stats import Stats
from findrec.errors import FindRecError
from findrec.paths import resolve

# What the names in the table mean: the fields of `Stats` in its order.
LABELS = {
    "users": "users",
    "items": "items with events",
    "events": "events",
    "length_mean": "history length, mean",
    "length_mu": "  lognormal mu",
    "length_sigma": "  lognormal sigma",
    "length_p5": "  5 %",
    "length_p50": "  median",
    "length_p95": "  95 %",
    "length_max": "  longest",
    "users_1000": "users with 1,000 events or more",
    "slope_head": "popularity slope, top tenth",
    "slope_middle": "  ranks 1-50 %",
    "share_top_1": "events on the top 1 % of items",
    "share_top_20": "  top 20 %",
    "items_below_5": "items with fewer than 5 events",
    "repeat_rate": "repeat rate",
    "repeat_lag_p25": "  lag in sessions, 25 %",
    "repeat_lag_p50": "  median",
    "repeat_lag_p75": "  75 %",
    "repeat_lag_p95": "  95 %",
    "distinct_after_100": "distinct items after 100 events",
    "distinct_after_500": "  500",
    "distinct_after_1000": "  1,000",
    "distinct_after_2000": "  2,000",
    "session_mean": "events of a session, mean",
    "session_p95": "  95 %",
    "gap_days_p50": "days between sessions, median",
    "gap_days_p95": "  95 %",
    "tie_rate": "events that share their time",
    "jaccard_neighbours": "top-100 overlap, neighbouring tenths",
    "jaccard_first_last": "  first and last tenth",
    "cold_share": "later half on items new to it",
}


def open_data(name: str) -> DataFolder:
    """The data set a user means: a folder, its address, one in `data/`, or a recipe prepared if need be."""
    if is_remote(name):
        return DataFolder.open(name, verify=False)
    for path in (Path(name).expanduser().resolve(), resolve(name), resolve("data") / name):
        if path.is_dir():
            return DataFolder.open(path, verify=False)
    return open_or_prepare(DataConfig(recipe=name))


def format_value(value: float | None) -> str:
    """A count with separators, a share or mean to three digits, a dash for what could not be measured."""
    if value is None or math.isnan(value):
        return "-"
    if float(value).is_integer() and abs(value) >= 1:
        return f"{int(value):,}"
    return f"{value:,.1f}" if abs(value) >= 100 else f"{value:.3g}"


def stats_table(found: Stats, targets: Mapping[str, float]) -> Table:
    """Every figure, with the real data's beside it where `targets` has one."""
    table = Table(box=box.SIMPLE_HEAD)
    table.add_column("")
    table.add_column("measured", justify="right")
    if targets:
        table.add_column("real data", justify="right")

    def row(label: str, value: float, target: float | None = None) -> None:
        table.add_row(label, format_value(value), *([format_value(target)] if targets else []))

    for name, label in LABELS.items():
        row(label, getattr(found, name), targets.get(name))
    for modality, share in found.present_items.items():
        row(f"items with {modality}", share)
        row("  events on them", found.present_events[modality])
    return table


def print_stats(found: Stats, targets: Mapping[str, float]) -> None:
    """Print the table."""
    Console().print(stats_table(found, targets))


def write_stats(found: Stats, path: Path) -> None:
    """Write the figures as JSON; what could not be measured is null."""
    tree = found.model_dump()
    plain = {k: None if isinstance(v, float) and math.isnan(v) else v for k, v in tree.items()}
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(plain, indent=1) + "\n", encoding="utf-8")
    except OSError as error:
        raise FindRecError(f"cannot write {path}: {error.strerror or error}") from error
