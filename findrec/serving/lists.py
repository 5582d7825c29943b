"""The results of serving: lists of items with raw ids and titles, and their conversion to tables."""

from __future__ import annotations

import importlib
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, Generic, TypeVar, overload

import pyarrow as pa

from findrec.errors import FindRecError

POPULARITY = "popularity"  # value of `Recommended.ranked_by` for histories without a known item


@dataclass(frozen=True)
class ItemList:
    """A list of items, best first; shorter than k if no other item may be listed."""

    items: list[str]  # raw ids
    titles: list[str]
    scores: list[float]
    more: dict[str, list[Any]] = field(default_factory=dict, kw_only=True)  # further columns of the items SQL


@dataclass(frozen=True)
class Recommended(ItemList):
    """The list of one user, or of one history that was passed instead of a user."""

    user: str  # raw id; of a history its label or its number, from 1
    time: int  # query time, seconds
    ranked_by: str = field(default="", kw_only=True)  # name of the model, or popularity without a history


@dataclass(frozen=True)
class SimilarItems(ItemList):
    """The items most similar to one item; scores are cosines."""

    item: str  # raw id
    title: str


One = TypeVar("One", Recommended, SimilarItems)


class Lists(Sequence[One], Generic[One]):
    """Several lists, as a sequence or as a table with one row per listed item."""

    def __init__(self, lists: Sequence[One]) -> None:
        self._lists: list[One] = list(lists)

    @overload
    def __getitem__(self, index: int) -> One: ...
    @overload
    def __getitem__(self, index: slice) -> Lists[One]: ...
    def __getitem__(self, index: int | slice) -> One | Lists[One]:
        """One list, or some of them."""
        return Lists(self._lists[index]) if isinstance(index, slice) else self._lists[index]

    def __len__(self) -> int:
        return len(self._lists)

    def __iter__(self) -> Iterator[One]:
        return iter(self._lists)

    def __repr__(self) -> str:
        return f"Lists({self._lists!r})"

    def to_arrow(self) -> pa.Table:
        """A pyarrow table: user and time (or similar_to), rank, item, title, score, further columns."""
        return as_table(self._lists)

    def to_pandas(self) -> Any:
        """`to_arrow` as a pandas DataFrame."""
        return self.to_arrow().to_pandas()

    def to_polars(self) -> Any:
        """`to_arrow` as a polars DataFrame; raises `FindRecError` if polars is not installed."""
        try:
            polars = importlib.import_module("polars")
        except ModuleNotFoundError:
            raise FindRecError("polars is not installed: pip install polars, or use to_arrow()") from None
        return polars.from_arrow(self.to_arrow())


def as_table(lists: Sequence[One]) -> pa.Table:
    """See `Lists.to_arrow`; without lists, the columns of recommendations."""
    columns: dict[str, Any] = {}
    if lists and isinstance(lists[0], SimilarItems):
        columns["similar_to"] = pa.array(_repeated(lists, "item"), pa.string())
    else:
        columns["user"] = pa.array(_repeated(lists, "user"), pa.string())
        columns["time"] = pa.array(_repeated(lists, "time"), pa.int64())
    columns |= {
        "rank": pa.array([rank + 1 for one in lists for rank in range(len(one.items))], pa.int64()),
        "item": pa.array([item for one in lists for item in one.items], pa.string()),
        "title": pa.array([title for one in lists for title in one.titles], pa.string()),
        "score": pa.array([score for one in lists for score in one.scores], pa.float64()),
    }
    for name in dict.fromkeys(name for one in lists for name in one.more if name not in columns):
        columns[name] = pa.array([value for one in lists for value in one.more[name]])
    return pa.table(columns)


def _repeated(lists: Sequence[One], name: str) -> list[Any]:
    return [getattr(one, name) for one in lists for _ in one.items]


def json_value(value: Any) -> Any:
    """A value of a table for JSON; numbers that are not finite, which JSON has not, become null."""
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, list):
        return [json_value(one) for one in value]
    return value if value is None or isinstance(value, bool | int | str) else str(value)
