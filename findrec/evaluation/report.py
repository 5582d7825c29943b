"""`report.html`: what a run did, on one page that needs no network, and the metrics table for a terminal."""

from __future__ import annotations

import base64
import io
import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jinja2
import matplotlib as mpl
import numpy as np
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator
from rich.table import Table

from findrec.datasets.batches import Part, evaluated_users
from findrec.datasets.folder import DataFolder
from findrec.evaluation.candidates import Candidates, Rule
from findrec.evaluation.report_template import TEMPLATE
from findrec.evaluation.scorers import IntArray, Scorer, UserBlock
from findrec.evaluation.topk import TopItems

_COLUMNS = ("users", "ndcg@10", "recall@10", "recall@50", "mrr", "coverage@10", "mean_rank")
_CURVES = {  # key of metrics.jsonl -> title; auxiliary terms follow under their own names
    "train/loss": "training loss",
    "valid/ndcg@10": "validation NDCG@10",
    "train/targets_per_s": "targets a second",
    "train/data_wait_share": "share of time waiting for data",
}
_GREY, _TEAL = "#7d8791", "#1c938b"  # readable on white and on black


@dataclass(frozen=True)
class Sample:
    """One user's recommendations in words."""

    user: str
    history: list[str]  # the last events before the targets, oldest first
    target: list[str]
    recommended: list[tuple[str, float]]  # best first, with scores


def sample_recommendations(
    scorer: Scorer,
    folder: DataFolder,
    split: Part,
    users: Sequence[int] | IntArray,
    k: int = 10,
    *,
    max_length: int = 200,
    mask_seen: bool = False,
    history: int = 10,
    candidates: Rule = "all",
) -> list[Sample]:
    """The first `k` items for some user rows (each needs a target in `split`), with titles for ids."""
    rows = np.asarray(users, dtype=np.int64)
    if not len(rows):
        return []
    block = UserBlock.read(folder, split, rows, max_length)
    ids_Bk, scores_Bk = TopItems(scorer, Candidates.of(folder, candidates)).of(block, k, mask_seen=mask_seen)
    titles = Titles(folder)
    samples = []
    for b, user in enumerate(rows):
        past = block.item[block.offset[b] : block.offset[b + 1]]
        best = zip(ids_Bk[b].tolist(), scores_Bk[b].tolist(), strict=True)
        samples.append(
            Sample(
                user=folder.user_ids[user],
                history=[titles.of(item) for item in past[-history:]],
                target=[titles.of(item) for item in block.cases.target[block.cases.row == b].tolist()],
                recommended=[(titles.of(item), score) for item, score in best if item],
            )
        )
    return samples


def draw_users(folder: DataFolder, split: Part, count: int, seed: int = 0) -> IntArray:
    """Up to `count` user rows with targets in `split`, drawn without replacement, ascending."""
    able = evaluated_users(folder, split)
    drawn = np.random.default_rng(seed).choice(able, size=min(count, len(able)), replace=False)
    return np.sort(drawn).astype(np.int64)


class Titles:
    """What items are called: their title, else their text, else their raw id."""

    def __init__(self, folder: DataFolder) -> None:
        there = [name for name in ("title", "text", "raw") if name in folder.items.column_names]
        self._columns = [folder.items.column(name) for name in there]

    def of(self, item: int) -> str:
        """The name of item 1..V."""
        for column in self._columns:
            if value := column[int(item) - 1].as_py():
                return str(value)
        return f"item {item}"


def format_table(rows: Sequence[Mapping[str, Any]], title: str | None = None) -> Table:
    """A rich table of metrics rows; its caption is their protocol."""
    shown = [name for name in _COLUMNS if any(name in row for row in rows)]
    protocols = dict.fromkeys(f"{row['split']}: {row['protocol']}" for row in rows)
    table = Table(title=title, caption="\n".join(protocols), caption_justify="left")
    table.add_column("model")
    for name in shown:
        table.add_column(name, justify="right")
    best = _best(rows, shown)
    for row in rows:
        cells = []
        for name in shown:
            text = format_number(row.get(name))
            cells.append(f"[bold]{text}[/bold]" if name in best and row.get(name) == best[name] else text)
        table.add_row(str(row["model"]).replace("[", r"\["), *cells)
    return table


def write_report(run_folder: Path, *, folder: DataFolder, samples: Sequence[Sample] = ()) -> Path:
    """Write `report.html` from what the run folder holds; what is missing is left out of the page.

    Reads `metrics.jsonl` (curves), `metrics.json` (tables) and `config.yaml`.
    """
    results = _read_json(run_folder / "metrics.json")
    config = run_folder / "config.yaml"
    environment = jinja2.Environment(autoescape=True, trim_blocks=True, undefined=jinja2.StrictUndefined)
    page = environment.from_string(TEMPLATE).render(
        name=run_folder.name,
        data=folder.manifest,
        tables=[_html_table(split, results[split]) for split in ("test", "valid") if results.get(split)],
        strata=_strata_table(results.get("strata", [])),
        curves=_curves(read_lines(run_folder / "metrics.jsonl")),
        samples=samples,
        config=config.read_text(encoding="utf-8") if config.is_file() else "(no config.yaml)",
    )
    temporary = run_folder / f".report.html.{os.getpid()}"
    temporary.write_text(page, encoding="utf-8")
    return temporary.replace(run_folder / "report.html")


def _read_json(path: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
    return found


def read_lines(path: Path) -> list[dict[str, Any]]:
    """The whole lines of a `metrics.jsonl`; none when it is not there."""
    lines = []
    for line in path.read_text(encoding="utf-8").splitlines() if path.is_file() else []:
        try:
            lines.append(json.loads(line))
        except json.JSONDecodeError:
            continue  # a killed run may leave half a line
    return [line for line in lines if isinstance(line, dict)]


def _best(rows: Sequence[Mapping[str, Any]], columns: Sequence[str]) -> dict[str, float]:
    """The winning value of each metric, where there is someone to win against."""
    best = {}
    for name in columns:
        values = [row[name] for row in rows if row.get(name) is not None]
        if name != "users" and len(values) > 1:
            best[name] = min(values) if name == "mean_rank" else max(values)
    return best


def format_number(value: Any) -> str:
    """A count with separators, a measurement with four places, a dash for what is not known."""
    if value is None:
        return "–"
    if isinstance(value, int):
        return f"{value:,}"
    return f"{value:.4f}" if abs(value) < 10 else f"{value:,.1f}"


def _html_table(split: str, rows: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    columns = [name for name in _COLUMNS if any(name in row for row in rows)]
    best = _best(rows, columns)
    return {
        "split": split,
        "protocols": list(dict.fromkeys(row["protocol"] for row in rows)),
        "columns": columns,
        "rows": [
            {
                "model": row["model"],
                "cells": [
                    {
                        "text": format_number(row.get(name)),
                        "error": "" if (e := row.get(f"{name}_se")) is None else format_number(e),
                        "best": name in best and row.get(name) == best[name],
                    }
                    for name in columns
                ],
            }
            for row in rows
        ],
    }


def _strata_table(rows: Sequence[Mapping[str, Any]]) -> dict[str, Any] | None:
    if not rows:
        return None
    columns = [name for name in rows[0] if name != "split"]
    values = [[row.get(name) for name in columns] for row in rows]
    cells = [[v if isinstance(v, str) else format_number(v) for v in row] for row in values]
    return {"columns": columns, "rows": cells}


def _curves(lines: Sequence[Mapping[str, Any]]) -> list[dict[str, str]]:
    auxiliary = sorted({key for line in lines for key in line if key.startswith("aux/")})
    drawn = []
    for key, title in (_CURVES | {key: key for key in auxiliary}).items():
        points = [(line["step"], line[key]) for line in lines if "step" in line and _is_finite(line.get(key))]
        if points:
            steps, values = zip(*points, strict=True)
            last = format_number(float(values[-1]))
            drawn.append({"title": title, "svg": draw_curve(steps, values), "last": last})
    return drawn


def _is_finite(value: Any) -> bool:
    return isinstance(value, int | float) and bool(np.isfinite(value))


def draw_curve(steps: Sequence[float], values: Sequence[float]) -> str:
    """One curve as base64 SVG, transparent, readable on light and dark; equal input gives equal bytes."""
    figure = Figure(figsize=(4.6, 2.5), layout="constrained")
    axes = figure.add_subplot()
    axes.plot(
        steps, values, color=_TEAL, linewidth=1.6, marker="o" if len(steps) < 40 else None, markersize=3
    )
    axes.set_xlabel("step", color=_GREY)
    axes.xaxis.set_major_locator(MaxNLocator(integer=True, nbins=6))
    axes.tick_params(colors=_GREY)
    axes.grid(alpha=0.25, color=_GREY)
    for side, spine in axes.spines.items():
        spine.set_visible(side in ("left", "bottom"))
        spine.set_color(_GREY)
    out = io.BytesIO()
    with mpl.rc_context({"svg.hashsalt": "findrec", "svg.fonttype": "none"}):
        figure.savefig(out, format="svg", transparent=True, metadata={"Date": None})
    return base64.b64encode(out.getvalue()).decode()
