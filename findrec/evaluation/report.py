"""What a run's results are called and look like in words: sample recommendations, tables, numbers."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from rich.table import Table

from findrec.datasets.batches import Part, evaluated_users
from findrec.datasets.folder import DataFolder
from findrec.evaluation.candidates import Candidates, Rule
from findrec.evaluation.scorers import IntArray, Scorer, UserBlock
from findrec.evaluation.topk import TopItems

COLUMNS = ("users", "ndcg@10", "recall@10", "recall@50", "mrr", "coverage@10", "mean_rank")


@dataclass(frozen=True)
class Named:
    """An item in words; `score` where it was recommended."""

    item: int
    text: str
    score: float = 0.0


@dataclass(frozen=True)
class Sample:
    """One user's recommendations in words."""

    user: str
    history: list[Named]  # the last events before the targets, oldest first
    target: list[Named]
    recommended: list[Named]  # best first


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

    def named(items: Iterable[int]) -> list[Named]:
        return [Named(int(item), titles.of(int(item))) for item in items]

    samples = []
    for user in rows:
        b = int(np.flatnonzero(block.user == user)[0])  # the first, where a user is asked at several moments
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
    shown = [name for name in COLUMNS if any(name in row for row in rows)]
    protocols = dict.fromkeys(f"{row['split']}: {row['protocol']}" for row in rows)
    table = Table(title=title, caption="\n".join(protocols), caption_justify="left")
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


def best_values(rows: Sequence[Mapping[str, Any]], columns: Sequence[str]) -> dict[str, float]:
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
