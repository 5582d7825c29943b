"""`findrec stats`: statistics of a data set, such as lengths, popularity, repeats, sessions and drift.

Makes four passes over the shards, one block of users at a time: memory grows with the number of items (ten
counters each), not with the events. Slopes are least-squares fits of log count to log rank.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray
from pydantic import BaseModel, ConfigDict, Field

from findrec.datasets.folder.data_folder import DataFolder
from findrec.datasets.folder.histories import Histories
from findrec.datasets.folder.overview import Overview, overview
from findrec.progress import progress

SESSION_GAP_S = 1800  # a longer pause begins a new session
TIME_BINS = 1 << 16  # histogram bins for the deciles of the time axis
DECILES = 10
TOP = 100  # most popular items compared between deciles
LANDMARKS = (100, 500, 1000, 2000)

Int64Array = NDArray[np.int64]


class Stats(BaseModel):
    """Statistics of one data set. Shares and rates lie between 0 and 1; NaN if undefined.

    Only items with events count. A repeat is an event whose item occurred before in the user's history; its
    lag is the number of sessions since the previous occurrence (repeats inside a session have none). Titles
    are the row labels of `findrec stats`.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    users: int = Field(title="users")
    items: int = Field(title="items with events")
    events: int = Field(title="events")
    length_mean: float = Field(title="history length, mean")
    length_mu: float = Field(title="  lognormal mu")  # mean of the log of the length
    length_sigma: float = Field(title="  lognormal sigma")  # its standard deviation
    length_p5: float = Field(title="  5 %")
    length_p50: float = Field(title="  median")
    length_p95: float = Field(title="  95 %")
    length_max: int = Field(title="  longest")
    users_1000: float = Field(title="users with 1,000 events or more")
    slope_head: float = Field(title="popularity slope, top tenth")  # ranks up to V / 10
    slope_middle: float = Field(title="  ranks 1-50 %")
    share_top_1: float = Field(title="events on the top 1 % of items")
    share_top_20: float = Field(title="  top 20 %")
    items_below_5: float = Field(title="items with fewer than 5 events")
    repeat_rate: float = Field(title="repeat rate")
    repeat_lag_p25: float = Field(title="  lag in sessions, 25 %")
    repeat_lag_p50: float = Field(title="  median")
    repeat_lag_p75: float = Field(title="  75 %")
    repeat_lag_p95: float = Field(title="  95 %")
    distinct_after_100: float = Field(
        title="distinct items after 100 events"
    )  # mean over users of at least 100 events
    distinct_after_500: float = Field(title="  500")
    distinct_after_1000: float = Field(title="  1,000")
    distinct_after_2000: float = Field(title="  2,000")
    session_mean: float = Field(title="events of a session, mean")
    session_p95: float = Field(title="  95 %")
    gap_days_p50: float = Field(title="days between sessions, median")  # in whole hours
    gap_days_p95: float = Field(title="  95 %")
    tie_rate: float = Field(title="events that share their time")
    jaccard_neighbours: float = Field(title="top-100 overlap, neighbouring tenths")  # top 100 items
    jaccard_first_last: float = Field(title="  first and last tenth")
    cold_share: float = Field(title="later half on items new to it")
    present_items: dict[str, float]  # share of items with this modality
    present_events: dict[str, float]
    overview: Overview


class _Histogram:
    """Counts of non-negative integers; quantiles are exact."""

    def __init__(self) -> None:
        self._count: Int64Array = np.zeros(1, dtype=np.int64)

    def add(self, values: NDArray[Any]) -> None:
        """Count `values`."""
        new = np.bincount(values, minlength=len(self._count)).astype(np.int64)
        new[: len(self._count)] += self._count
        self._count = new

    def mean(self) -> float:
        """Mean; NaN if empty."""
        total = self._count.sum()
        return float(np.arange(len(self._count)) @ self._count / total) if total else float("nan")

    def quantile(self, share: float) -> float:
        """The smallest number that at least a `share` of all do not exceed; NaN if empty."""
        cumulative = np.cumsum(self._count)
        if not cumulative[-1]:
            return float("nan")
        return float(np.searchsorted(cumulative, share * cumulative[-1]))


@dataclass
class _HistoryCounts:
    """Counts gathered in one pass over the users."""

    repeats: int = 0
    tied: int = 0
    lags: _Histogram = field(default_factory=_Histogram)
    sessions: _Histogram = field(default_factory=_Histogram)
    gap_hours: _Histogram = field(default_factory=_Histogram)
    distinct: dict[int, list[int]] = field(default_factory=lambda: {n: [0, 0] for n in LANDMARKS})

    def add(self, block: Histories) -> None:
        """Add the histories of some users."""
        item, time = block.item.astype(np.int64), block.timestamp.astype(np.int64)
        offset = block.offset.astype(np.int64)
        length = np.diff(offset)
        row = np.repeat(np.arange(len(length)), length)
        first = np.zeros(len(item), dtype=bool)
        first[offset[:-1]] = True
        pause = np.diff(time, prepend=time[:1])
        begins = first | (pause > SESSION_GAP_S)
        self.sessions.add(np.diff(np.append(np.flatnonzero(begins), len(item))))
        self.gap_hours.add(np.maximum(pause[begins & ~first], 0) // 3600)
        equal = ~first & (pause == 0)
        self.tied += int(np.count_nonzero(equal | np.append(equal[1:], False)))
        num_distinct = np.cumsum(self._count_repeats(row, item, np.cumsum(begins)))
        for landmark, sums in self.distinct.items():
            long = offset[:-1][length >= landmark]
            sums[0] += len(long)
            sums[1] += int(np.sum(num_distinct[long + landmark - 1] - num_distinct[long] + 1))

    def _count_repeats(self, row: Int64Array, item: Int64Array, session: Int64Array) -> NDArray[np.bool_]:
        """Count the repeats; returns `[N]` True at the first occurrence of an item in a history."""
        order = np.lexsort((item, row))  # stable: keeps the events of a user-item pair in order
        repeated = (np.diff(item[order]) == 0) & (np.diff(row[order]) == 0)
        lag = np.diff(session[order])[repeated]
        self.repeats += len(lag)
        self.lags.add(lag[lag > 0])
        is_first = np.ones(len(item), dtype=bool)
        is_first[order[1:][repeated]] = False
        return is_first


def _blocks(folder: DataFolder, label: str) -> Iterator[Histories]:
    """All histories in blocks, with a progress bar."""
    with progress(label, total=folder.manifest.num_events, unit="events") as bar:
        for block in folder.blocks():
            yield block
            bar.advance(len(block.item))


def _decile_edges(folder: DataFolder, first: int, last: int) -> NDArray[np.float64]:
    """`[9]` times that split the events into tenths, to 1/65536 of the time span."""
    width = max(last - first + 1, 1) / TIME_BINS
    count = np.zeros(TIME_BINS, dtype=np.int64)
    for block in _blocks(folder, "measure the time axis"):
        time_bin = ((block.timestamp - first) / width).astype(np.int64)
        count += np.bincount(np.minimum(time_bin, TIME_BINS - 1), minlength=TIME_BINS)
    cumulative = np.cumsum(count)
    shares = np.arange(1, DECILES) / DECILES * cumulative[-1]
    edge_bins = np.searchsorted(cumulative, shares).astype(np.float64)
    return np.asarray(first + width * (edge_bins + 1))


def _slope(count: Int64Array, begin: float, end: float) -> float:
    """Negative slope of log count over log rank for the ranks `begin` to `end`, counting from 1."""
    rank = np.arange(max(1, int(np.ceil(begin))), int(end) + 1)
    if len(rank) < 3:
        return float("nan")
    return float(-np.polyfit(np.log(rank), np.log(count[rank - 1]), 1)[0])


def _jaccard(one: Int64Array, other: Int64Array) -> float:
    """Jaccard index of the most popular items of two periods."""
    tops = [
        set(np.argsort(-count, kind="stable")[: min(TOP, int((count > 0).sum()))].tolist())
        for count in (one, other)
    ]
    union = tops[0] | tops[1]
    return len(tops[0] & tops[1]) / len(union) if union else float("nan")


def _over_time(count_TV: Int64Array) -> dict[str, float]:
    neighbours = [_jaccard(count_TV[t], count_TV[t + 1]) for t in range(DECILES - 1)]
    half = DECILES // 2
    later = count_TV[half:].sum(axis=0)
    cold = later[count_TV[:half].sum(axis=0) == 0].sum()
    return {
        "jaccard_neighbours": float(np.mean(neighbours)),
        "jaccard_first_last": _jaccard(count_TV[0], count_TV[-1]),
        "cold_share": float(cold / later.sum()) if later.sum() else float("nan"),
    }


def _popularity(count: Int64Array) -> dict[str, float]:
    """Popularity statistics from `count` `[V]`: events of each item, positive and descending."""
    num = len(count)
    return {
        "slope_head": _slope(count, 1, num / 10),
        "slope_middle": _slope(count, num / 100, num / 2),
        "share_top_1": float(count[: max(1, round(num / 100))].sum() / count.sum()),
        "share_top_20": float(count[: max(1, round(num / 5))].sum() / count.sum()),
        "items_below_5": float((count < 5).mean()),
    }


def measure(folder: DataFolder) -> Stats:
    """Compute the statistics of a data folder, with a progress bar for each pass."""
    counts = _HistoryCounts()
    first, last = np.iinfo(np.int64).max, np.iinfo(np.int64).min
    for block in _blocks(folder, "measure histories"):
        counts.add(block)
        first, last = min(first, int(block.timestamp.min())), max(last, int(block.timestamp.max()))
    edges = _decile_edges(folder, first, last)
    count_TV = np.zeros((DECILES, folder.num_items + 1), dtype=np.int64)
    for block in _blocks(folder, "measure items over time"):
        decile = np.searchsorted(edges, block.timestamp, side="right")
        np.add.at(count_TV, (decile, block.item), 1)
    count = count_TV.sum(axis=0)
    length, events = folder.length, folder.manifest.num_events
    log = np.log(length)
    p5, p50, p95 = np.quantile(length, [0.05, 0.5, 0.95]).tolist()
    lag = {f"repeat_lag_p{q}": counts.lags.quantile(q / 100) for q in (25, 50, 75, 95)}
    distinct = {
        f"distinct_after_{n}": total / users if users else float("nan")
        for n, (users, total) in counts.distinct.items()
    }
    present = {name: folder.feature(name).present for name in folder.modalities}
    return Stats(
        users=folder.num_users,
        items=int((count > 0).sum()),
        events=events,
        length_mean=float(length.mean()),
        length_mu=float(log.mean()),
        length_sigma=float(log.std()),
        length_p5=p5,
        length_p50=p50,
        length_p95=p95,
        length_max=int(length.max()),
        users_1000=float((length >= 1000).mean()),
        **_popularity(-np.sort(-count[count > 0])),
        repeat_rate=counts.repeats / events,
        **lag,
        **distinct,
        session_mean=counts.sessions.mean(),
        session_p95=counts.sessions.quantile(0.95),
        gap_days_p50=counts.gap_hours.quantile(0.5) / 24,
        gap_days_p95=counts.gap_hours.quantile(0.95) / 24,
        tie_rate=counts.tied / events,
        **_over_time(count_TV),
        present_items={name: float(mask[1:].mean()) for name, mask in present.items()},
        present_events={name: float(count @ mask / events) for name, mask in present.items()},
        overview=overview(folder),
    )
