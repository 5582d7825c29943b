"""Results as text: sample recommendations, item titles, metrics tables and numbers."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from rich.table import Table

from findrec.datasets.batches.evaluation import Part, evaluated_users
from findrec.datasets.folder.data_folder import DataFolder
from findrec.evaluation.protocol import RankingProtocol
from findrec.evaluation.scoring.base import Scorer
from findrec.evaluation.scoring.candidates import Candidates
from findrec.evaluation.scoring.users import IntArray

COLUMNS = ("users", "ndcg@10", "recall@10", "recall@50", "mrr", "coverage@10", "mean_rank")


@dataclass(frozen=True)
class Named:
    """An item with its title; `score` is set for recommended items."""

    item: int
    text: str
    score: float = 0.0


@dataclass(frozen=True)
class Sample:
    """One user's recommendations with item titles."""

    user: str
    history: list[Named]  # the last events before the targets, oldest first
    target: list[Named]
    recommended: list[Named]  # best first


def sample_recommendations(
    scorer: Scorer,
    folder: DataFolder,
    split: Part,
    users: Sequence[int] | IntArray,
    protocol: RankingProtocol,
    *,
    k: int = 10,
    history: int = 10,
) -> list[Sample]:
    """Recommend `k` items to some user rows, each of which needs a target in `split`."""
    rows = np.asarray(users, dtype=np.int64)
    if not len(rows):
        return []
    query = protocol.query(folder, split, rows, Candidates.of(folder, protocol.candidates))
    block = query.block
    ids_Bk, scores_Bk = scorer.rank(query).top(k if scorer.list_limit is None else min(k, scorer.list_limit))
    titles = Titles(folder)

    def named(items: Iterable[int]) -> list[Named]:
        return [Named(int(item), titles.of(int(item))) for item in items]

    samples = []
    for user in rows:
        b = int(np.flatnonzero(block.user == user)[0])  # the earliest row of the user
        best = zip(ids_Bk[b].tolist(), scores_Bk[b].tolist(), strict=True)
        samples.append(
            Sample(
                user=folder.user_ids[user],
                history=named(block.item[block.offset[b] : block.offset[b + 1]][-history:]),
                target=named(block.cases.target[block.cases.row == b].tolist()),
                recommended=[Named(item, titles.of(item), score) for item, score in best if item],
            )
        )
    return samples


def draw_users(folder: DataFolder, split: Part, count: int, seed: int = 0) -> IntArray:
    """Draw up to `count` user rows with targets in `split`, without replacement; ascending."""
    users = evaluated_users(folder, split)
    drawn = np.random.default_rng(seed).choice(users, size=min(count, len(users)), replace=False)
    return np.sort(drawn).astype(np.int64)


class Titles:
    """Display names of items: the title, or else the text, or else the raw id."""

    def __init__(self, folder: DataFolder) -> None:
        names = [name for name in ("title", "text", "raw") if name in folder.items.column_names]
        self._columns = [folder.items.column(name) for name in names]

    def of(self, item: int) -> str:
        """The name of item 1..V."""
        for column in self._columns:
            if value := column[int(item) - 1].as_py():
                return str(value)
        return f"item {item}"


def format_table(rows: Sequence[Mapping[str, Any]], title: str | None = None) -> Table:
    """A rich table of metrics rows with their protocol as the caption."""
    shown = [name for name in COLUMNS if any(name in row for row in rows)]
    protocols = "\n".join(f"{rows[0]['split']}: {line}" for line in protocol_lines(rows))
    table = Table(title=title, caption=protocols, caption_justify="left")
    table.add_column("model")
    for name in shown:
        table.add_column(name, justify="right")
    best = best_values(rows, shown)
    for row in rows:
        cells = []
        for name in shown:
            text = format_number(row.get(name))
            cells.append(f"[bold]{text}[/bold]" if name in best and row.get(name) == best[name] else text)
        table.add_row(str(row["model"]).replace("[", r"\["), *cells)
    return table


def protocol_lines(rows: Sequence[Mapping[str, Any]]) -> list[str]:
    """The distinct protocols of metrics rows, and the models whose ranks are known within lists only."""
    lists = [f"{row['model']}: ranks of {row['ranks']}" for row in rows if "ranks" in row]
    return [*dict.fromkeys(str(row["protocol"]) for row in rows), *lists]


def best_values(rows: Sequence[Mapping[str, Any]], columns: Sequence[str]) -> dict[str, float]:
    """The best value of each metric that at least two rows have."""
    best = {}
    for name in columns:
        values = [row[name] for row in rows if row.get(name) is not None]
        if name != "users" and len(values) > 1:
            best[name] = min(values) if name == "mean_rank" else max(values)
    return best


def format_number(value: Any) -> str:
    """Format a count with separators, a measurement with four decimals, and None as a dash."""
    if value is None:
        return "–"
    if isinstance(value, int):
        return f"{value:,}"
    return f"{value:.4f}" if abs(value) < 10 else f"{value:,.1f}"


def is_finite(value: Any) -> bool:
    """Whether a logged value is a finite number."""
    return isinstance(value, int | float) and math.isfinite(value)
