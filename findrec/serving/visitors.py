"""Histories that are passed by the caller, for visitors who are not in the data of a run.

They are lists of raw item ids, or a table with one row per event. Items that the data folder does not know
are left out, as a new item may appear in a shop before the model is trained again.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from itertools import pairwise
from typing import Any

import numpy as np
import pyarrow as pa

from findrec.datasets.folder.data_folder import DataFolder
from findrec.datasets.folder.histories import Histories
from findrec.datasets.sources.tables import is_table, to_arrow
from findrec.errors import FindRecError, suggest
from findrec.evaluation.scoring.users import IntArray
from findrec.progress import warn
from findrec.serving.query_blocks import Asked

_COLUMNS = ("user", "item", "timestamp", "event")


def raw_ids(values: object) -> list[str]:
    """Raw ids as text: of one id, a list, an array, or a column of pandas, polars or pyarrow."""
    if isinstance(values, str | bytes) or not isinstance(values, Iterable):
        return [str(values)]
    for convert in ("to_pylist", "to_list", "tolist"):
        if hasattr(values, convert):
            values = getattr(values, convert)()
            break
    return [str(value) for value in values]  # type: ignore[attr-defined]


def read_visitors(
    folder: DataFolder,
    item_ids: Mapping[str, int],
    histories: object,
    times: Sequence[Sequence[int]] | None,
    events: Sequence[Sequence[str | None]] | None,
    *,
    latest: int,
    at: int | None,
) -> Asked:
    """The given histories, as rows of item ids.

    Args:
        folder: the data of the run.
        item_ids: ids 1..V by raw id.
        histories: sequences of raw item ids, oldest first, or a table with the columns `item`, optionally
            `user`, `timestamp` (seconds) and `event` (type of the event). The events of a user in a table
            are sorted by time.
        times: seconds of the events of each history.
        events: types of the events of each history.
        latest: the time of all events without a time.
        at: query time; later events are left out. Default: the time of the last event.

    Raises:
        FindRecError: for lengths that do not match, times that decrease, or unknown event types.
    """
    labels = None
    if is_table(histories):
        if times is not None or events is not None:
            raise FindRecError("histories: a table has its times and events in columns; leave out the others")
        labels, histories, times, events = _grouped(to_arrow(histories, "histories"))
    if isinstance(histories, str | bytes) or not isinstance(histories, Sequence):
        raise FindRecError(
            f"histories must be a list of lists of raw item ids, or a table, not {type(histories).__name__}"
        )
    if any(isinstance(one, str | bytes) or not isinstance(one, Iterable) for one in histories):
        raise FindRecError(
            "histories must be a list of lists: write [[...]] for a single history of raw item ids"
        )
    rows = [raw_ids(one) for one in histories]
    for name, given in (("times", times), ("events", events)):
        if given is not None and [len(one) for one in given] != [len(one) for one in rows]:
            raise FindRecError(f"{name}: there must be one value for each event of each history")
    codes = {name: code for code, name in enumerate(folder.manifest.event_types)}
    items: list[int] = []
    stamps: list[int] = []
    types: list[int] = []
    offset, unknown = [0], []
    query = []
    for number, row in enumerate(rows):
        stamp = [latest] * len(row) if times is None else [_seconds(time) for time in times[number]]
        if any(later < earlier for earlier, later in pairwise(stamp)):
            raise FindRecError(f"times of history {number + 1} decrease: give the oldest event first")
        event = [None] * len(row) if events is None else events[number]
        query.append(at if at is not None else stamp[-1] if stamp else latest)
        for raw, time, kind in zip(row, stamp, event, strict=True):
            if at is not None and time > at and times is not None:
                continue
            if (item := item_ids.get(raw)) is None:
                unknown.append(raw)
                continue
            if kind is not None and kind not in codes:
                raise FindRecError(f"unknown event type {kind!r}{suggest(str(kind), codes)}")
            items.append(item)
            stamps.append(time)
            types.append(-1 if kind is None else codes[kind])
        offset.append(len(items))
    if unknown:
        warn(
            f"{len(unknown):,} events of the given histories are of items that are not in the data, e.g. "
            f"{unknown[0]!r}{suggest(unknown[0], item_ids)}: they are left out"
        )
    past = Histories(
        np.array(items, dtype=np.int64),
        np.array(stamps, dtype=np.int64),
        np.array(offset, dtype=np.int64),
        np.array(types, dtype=np.int64) if codes else None,
    )
    numbers = [str(number + 1) for number in range(len(rows))]
    return Asked(labels or numbers, np.diff(past.offset), np.array(query, dtype=np.int64), reader_of(past))


def reader_of(past: Histories) -> Callable[[IntArray], Histories]:
    """A function of rows that returns their histories, as `Asked.histories`."""

    def read(rows: IntArray) -> Histories:
        size = np.diff(past.offset)[rows]
        offset = np.concatenate([[0], np.cumsum(size)]).astype(np.int64)
        index = np.repeat(past.offset[rows] - offset[:-1], size) + np.arange(offset[-1])
        return past.take(index, offset)

    return read


def _seconds(time: Any) -> int:
    try:
        return int(time)
    except (TypeError, ValueError):
        raise FindRecError(f"times are whole seconds since 1970, not {time!r}") from None


def _grouped(table: pa.Table) -> tuple[list[str] | None, list[Any], list[Any] | None, list[Any] | None]:
    """Labels, items, times and events of each user of a table, in the order of first occurrence."""
    if "item" not in table.column_names:
        raise FindRecError(
            f"histories: the table has no column 'item' (columns: {', '.join(table.column_names)}; known: "
            f"{', '.join(_COLUMNS)})"
        )
    columns = {name: table[name].to_pylist() for name in _COLUMNS if name in table.column_names}
    order = list(range(table.num_rows))
    if "timestamp" in columns:
        columns["timestamp"] = [_seconds(time) for time in columns["timestamp"]]
        order.sort(key=columns["timestamp"].__getitem__)
    users = [str(user) for user in columns.get("user", ["1"] * table.num_rows)]
    rows: dict[str, list[int]] = {user: [] for user in users}
    for row in order:
        rows[users[row]].append(row)

    def of(name: str) -> list[Any] | None:
        return [[columns[name][i] for i in one] for one in rows.values()] if name in columns else None

    return list(rows), of("item") or [], of("timestamp"), of("event")
