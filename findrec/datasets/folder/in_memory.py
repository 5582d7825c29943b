"""Write a data folder from arrays in memory, for small logs, notebooks and tests."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from findrec.datasets.folder.data_folder import DataFolder
from findrec.datasets.folder.features import FeatureInput
from findrec.datasets.folder.splits import Split
from findrec.datasets.folder.writer import SHARD_BYTES, USERS_PER_MEMBER, Block, FolderInput, write_folder
from findrec.errors import FindRecError


def _blocks(
    histories: Sequence[Sequence[int] | NDArray[Any]],
    timestamps: Sequence[Sequence[int] | NDArray[Any]] | None,
    events: Sequence[Sequence[str]] | None,
    types: list[str],
    users_per_member: int,
) -> Iterator[Block]:
    for begin in range(0, len(histories), users_per_member):
        items = [np.asarray(h, dtype=np.int64) for h in histories[begin : begin + users_per_member]]
        length = np.array([len(h) for h in items], dtype=np.int64)
        if timestamps is None:
            times = [60 * np.arange(n, dtype=np.int64) for n in length]
        else:
            times = [np.asarray(t, dtype=np.int64) for t in timestamps[begin : begin + users_per_member]]
        columns = {"item": np.concatenate(items), "timestamp": np.concatenate(times)}
        if events is not None:
            names = [name for user in events[begin : begin + users_per_member] for name in user]
            columns["event"] = np.searchsorted(types, names)
        yield Block(columns, length)


def _feature(modality: str, values: NDArray[Any], num_items: int) -> FeatureInput:
    values = np.asarray(values)
    if values.ndim == 2 and len(values) == num_items:
        values = np.concatenate([np.zeros_like(values[:1]), values])
    if values.ndim != 2 or len(values) != num_items + 1:
        raise FindRecError(
            f"features of {modality!r} have shape {values.shape}: pass [{num_items}, D] (items 1..V) or "
            f"[{num_items + 1}, D] (row 0 is padding)"
        )
    present = ~np.isnan(values).any(axis=1)
    return FeatureInput(modality, values, present, encoder="given")


def write_data_folder(
    path: Path,
    histories: Sequence[Sequence[int] | NDArray[Any]],
    timestamps: Sequence[Sequence[int] | NDArray[Any]] | None = None,
    texts: Sequence[str] | None = None,
    features: Mapping[str, NDArray[Any]] | None = None,
    *,
    events: Sequence[Sequence[str]] | None = None,
    num_items: int | None = None,
    unit: Literal["event", "timestamp"] = "event",
    split: Split | None = None,
    users_per_member: int = USERS_PER_MEMBER,
    shard_bytes: int = SHARD_BYTES,
) -> DataFolder:
    """Write histories in memory as a data folder and open it.

    Args:
        path: Path of the folder.
        histories: Item ids (from 1) of each user, oldest event first.
        timestamps: Times of the events in seconds, never decreasing; default: one event per minute.
        texts: Description of each item, which is stored but not encoded.
        features: `[V, D]`, or `[V+1, D]` with a padding row, by modality; rows with NaN count as missing.
        events: Type names of the events.
        num_items: Number of items V; default: the largest id.
        unit: Unit of the default split, which is leave-one-out.
        split: Another split; quantiles are not resolved here.
        users_per_member: Users per sample of a shard.
        shard_bytes: A shard is closed once it is larger.

    Raises:
        FindRecError: If the input is empty or inconsistent.
    """
    if not len(histories) or any(len(h) == 0 for h in histories):
        raise FindRecError("every user needs at least one event")
    if timestamps is not None and [len(t) for t in timestamps] != [len(h) for h in histories]:
        raise FindRecError("timestamps must have the same lengths as the histories")
    if events is not None and [len(e) for e in events] != [len(h) for h in histories]:
        raise FindRecError("events must have the same lengths as the histories")
    types = sorted({name for user in events or () for name in user})
    num_items = num_items or max(int(np.max(h)) for h in histories)
    if texts is not None and len(texts) != num_items:
        raise FindRecError(f"{len(texts)} texts for {num_items} items: pass one for each of the ids 1..V")
    names, nulls = [str(v) for v in range(1, num_items + 1)], pa.nulls(num_items, pa.string())
    items = pa.table(
        {
            "raw": pa.array(names),
            "title": pa.array(list(texts) if texts is not None else [f"item {name}" for name in names]),
            "text": nulls if texts is None else pa.array(list(texts), pa.string()),
            "category": nulls,
        }
    )
    contents = FolderInput(
        recipe=Path(path).name,
        recipe_sha256=hashlib.sha256(b"arrays in memory").hexdigest(),
        split=split or Split(unit=unit),
        users=pa.array([str(u) for u in range(len(histories))]),
        items=items,
        blocks=_blocks(histories, timestamps, events, types, users_per_member),
        event_types=types,
        features=[_feature(name, values, num_items) for name, values in (features or {}).items()],
    )
    write_folder(Path(path), contents, shard_bytes=shard_bytes)
    return DataFolder.open(Path(path))
