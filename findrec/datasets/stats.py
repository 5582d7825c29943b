"""`findrec stats`: the statistics of a data set that decide what can be learnt from it and at what cost.

Three passes over the packed shards, one block of users at a time: memory grows with the number of items (ten
counters each) and never with the events. Slopes are least-squares fits of log count on log rank.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray
from pydantic import BaseModel, ConfigDict

from findrec.datasets.folder import DataFolder
from findrec.datasets.histories import Histories
from findrec.progress import progress

SESSION_GAP_S = 1800  # a longer pause begins a new session
TIME_BINS = 1 << 16  # in which the deciles of the time axis are found
DECILES = 10
TOP = 100  # items that are compared between deciles
LANDMARKS = (100, 500, 1000, 2000)

Int64Array = NDArray[np.int64]


class Stats(BaseModel):
    """Statistics of one data set. Shares and rates lie between 0 and 1; NaN where nothing was to be measured.

    Items are those with at least one event. A repeat is an event whose item the same user had before; its lag
    is counted in sessions from the latest earlier one (repeats inside a session have none).
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    users: int
    items: int
    events: int
    length_mean: float
    length_mu: float  # mean of the log of the length
    length_sigma: float  # its standard deviation
    length_p5: float
    length_p50: float
    length_p95: float
    length_max: int
    users_1000: float  # users with at least 1,000 events
    slope_head: float  # popularity: ranks up to a tenth of the items
    slope_middle: float  # ranks from 1 to 50 per cent of the items
    share_top_1: float  # events on the most popular 1 per cent of the items
    share_top_20: float
    items_below_5: float  # items with fewer than 5 events
    repeat_rate: float
    repeat_lag_p25: float
    repeat_lag_p50: float
    repeat_lag_p75: float
    repeat_lag_p95: float
    distinct_after_100: float  # mean over the users with so many events
    distinct_after_500: float
    distinct_after_1000: float
    distinct_after_2000: float
    session_mean: float  # events
    session_p95: float
    gap_days_p50: float  # from the end of a session to the start of the user's next, in whole hours
    gap_days_p95: float
    tie_rate: float  # events that share their timestamp with another of the same user
    jaccard_neighbours: float  # the 100 most popular items of neighbouring tenths of the events by time
    jaccard_first_last: float
    cold_share: float  # later-half events on items without one in the first half
    present_items: dict[str, float]  # share of items with this modality
    present_events: dict[str, float]


class _Counted:
    """How often each whole number was seen; quantiles are exact."""

    def __init__(self) -> None:
        self._count: Int64Array = np.zeros(1, dtype=np.int64)

    def add(self, values: NDArray[Any]) -> None:
        """Count `values`, none of them negative."""
        new = np.bincount(values, minlength=len(self._count)).astype(np.int64)
        new[: len(self._count)] += self._count
        self._count = new

    def mean(self) -> float:
        """Mean; NaN of nothing."""
        total = self._count.sum()
        return float(np.arange(len(self._count)) @ self._count / total) if total else float("nan")

    def quantile(self, share: float) -> float:
        """The smallest number that at least `share` of all do not exceed; NaN of nothing."""
        cumulative = np.cumsum(self._count)
        if not cumulative[-1]:
            return float("nan")
        return float(np.searchsorted(cumulative, share * cumulative[-1]))


@dataclass
class _Tally:
    """What one pass over the users gathers."""

    repeats: int = 0
    tied: int = 0
    lags: _Counted = field(default_factory=_Counted)
    sessions: _Counted = field(default_factory=_Counted)
    gap_hours: _Counted = field(default_factory=_Counted)
    distinct: dict[int, list[int]] = field(default_factory=lambda: {n: [0, 0] for n in LANDMARKS})

    def add(self, block: Histories) -> None:
        """Take in the histories of some users."""
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
        fresh = self._repeats(row, item, np.cumsum(begins))
        seen = np.cumsum(fresh)
        for landmark, sums in self.distinct.items():
            long = offset[:-1][length >= landmark]
            sums[0] += len(long)
            sums[1] += int(np.sum(seen[long + landmark - 1] - seen[long] + 1))

    def _repeats(self, row: Int64Array, item: Int64Array, session: Int64Array) -> NDArray[np.bool_]:
        """Count the repeats; `[N]` True where an item comes for the first time."""
        order = np.lexsort((item, row))  # stable: the events of a pair stay in their order
        again = (np.diff(item[order]) == 0) & (np.diff(row[order]) == 0)
        lag = np.diff(session[order])[again]
        self.repeats += len(lag)
        self.lags.add(lag[lag > 0])
        fresh = np.ones(len(item), dtype=bool)
        fresh[order[1:][again]] = False
        return fresh


def _reported(folder: DataFolder, what: str) -> Iterator[Histories]:
    with progress(what, total=folder.manifest.num_events, unit="events") as bar:
        for block in folder.blocks():
            yield block
            bar.advance(len(block.item))


def _decile_edges(folder: DataFolder, first: int, last: int) -> NDArray[np.float64]:
    """`[9]` times that cut the events into tenths, to 1/65536 of the span."""
    width = max(last - first + 1, 1) / TIME_BINS
    count = np.zeros(TIME_BINS, dtype=np.int64)
    for block in _reported(folder, "measure the time axis"):
        place = ((block.timestamp - first) / width).astype(np.int64)
        count += np.bincount(np.minimum(place, TIME_BINS - 1), minlength=TIME_BINS)
    cumulative = np.cumsum(count)
    shares = np.arange(1, DECILES) / DECILES * cumulative[-1]
    places = np.searchsorted(cumulative, shares).astype(np.float64)
    return np.asarray(first + width * (places + 1))


def _slope(count: Int64Array, begin: float, end: float) -> float:
    """Steepness of log count against log rank over the ranks `begin .. end` (1 is the first)."""
    rank = np.arange(max(1, int(np.ceil(begin))), int(end) + 1)
    if len(rank) < 3:
        return float("nan")
    return float(-np.polyfit(np.log(rank), np.log(count[rank - 1]), 1)[0])


def _jaccard(one: Int64Array, other: Int64Array) -> float:
    """Overlap of the most popular items of two periods: shared over all."""
    top = []
    for count in (one, other):
        some = min(TOP, int((count > 0).sum()))
        top.append(set(np.argsort(-count, kind="stable")[:some].tolist()))
    union = top[0] | top[1]
    return len(top[0] & top[1]) / len(union) if union else float("nan")


def _over_time(count_TV: Int64Array) -> dict[str, float]:
    near = [_jaccard(count_TV[t], count_TV[t + 1]) for t in range(DECILES - 1)]
    half = DECILES // 2
    later = count_TV[half:].sum(axis=0)
    cold = later[count_TV[:half].sum(axis=0) == 0].sum()
    return {
        "jaccard_neighbours": float(np.mean(near)),
        "jaccard_first_last": _jaccard(count_TV[0], count_TV[-1]),
        "cold_share": float(cold / later.sum()) if later.sum() else float("nan"),
    }


def _popularity(count: Int64Array) -> dict[str, float]:
    """`count` `[V]`: events of each item, the most popular first, all of them positive."""
    num = len(count)
    return {
        "slope_head": _slope(count, 1, num / 10),
        "slope_middle": _slope(count, num / 100, num / 2),
        "share_top_1": float(count[: max(1, round(num / 100))].sum() / count.sum()),
        "share_top_20": float(count[: max(1, round(num / 5))].sum() / count.sum()),
        "items_below_5": float((count < 5).mean()),
    }


def measure(folder: DataFolder) -> Stats:
    """Measure a data folder; progress is shown for each pass."""
    tally = _Tally()
    first, last = np.iinfo(np.int64).max, np.iinfo(np.int64).min
    for block in _reported(folder, "measure histories"):
        tally.add(block)
        first, last = min(first, int(block.timestamp.min())), max(last, int(block.timestamp.max()))
    edges = _decile_edges(folder, first, last)
    count_TV = np.zeros((DECILES, folder.num_items + 1), dtype=np.int64)
    for block in _reported(folder, "measure items over time"):
        decile = np.searchsorted(edges, block.timestamp, side="right")
        np.add.at(count_TV, (decile, block.item), 1)
    count = count_TV.sum(axis=0)
    length, events = folder.length, folder.manifest.num_events
    log = np.log(length)
    p5, p50, p95 = np.quantile(length, [0.05, 0.5, 0.95])
    lag = {f"repeat_lag_p{q}": tally.lags.quantile(q / 100) for q in (25, 50, 75, 95)}
    distinct = {
        f"distinct_after_{n}": total / users if users else float("nan")
        for n, (users, total) in tally.distinct.items()
    }
    present = {name: folder.feature(name).present for name in folder.modalities}
    return Stats(
        users=folder.num_users,
        items=int((count > 0).sum()),
        events=events,
        length_mean=float(length.mean()),
        length_mu=float(log.mean()),
        length_sigma=float(log.std()),
        length_p5=float(p5),
        length_p50=float(p50),
        length_p95=float(p95),
        length_max=int(length.max()),
        users_1000=float((length >= 1000).mean()),
        **_popularity(-np.sort(-count[count > 0])),
        repeat_rate=tally.repeats / events,
        **lag,
        **distinct,
        session_mean=tally.sessions.mean(),
        session_p95=tally.sessions.quantile(0.95),
        gap_days_p50=tally.gap_hours.quantile(0.5) / 24,
        gap_days_p95=tally.gap_hours.quantile(0.95) / 24,
        tie_rate=tally.tied / events,
        **_over_time(count_TV),
        present_items={name: float(there[1:].mean()) for name, there in present.items()},
        present_events={name: float(count @ there / events) for name, there in present.items()},
    )
