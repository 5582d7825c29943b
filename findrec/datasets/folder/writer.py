"""Write a data folder atomically.

All files go into a sibling folder, which is renamed at the end, after its manifest is written. A failure (a
crash, a full disk, missing permissions) leaves the old folder or none, never a part of the new one.
"""

from __future__ import annotations

import hashlib
import shutil
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
from numpy.typing import NDArray
from webdataset import TarWriter

from findrec.datasets.folder.features import FeatureInput, store_feature
from findrec.datasets.folder.manifest import (
    Manifest,
    ParentEntry,
    ShardEntry,
    SourceEntry,
    write_manifest,
)
from findrec.datasets.folder.shards import DTYPES
from findrec.datasets.folder.splits import Split, cut, unit_starts
from findrec.errors import FindRecError
from findrec.files import abandoned, beside, remove_abandoned, sha256_file
from findrec.locks import holding

USERS_PER_MEMBER = 512
SHARD_BYTES = 64 << 20  # a shard is closed once it is larger
USERS_PER_GROUP = 1 << 20  # users per row group of users.parquet
IDS_AT_ONCE = 1 << 16  # ids hashed at a time
_USER_COLUMNS = ("length", "valid_start", "test_start", "shard", "member", "row")
_NO_TIME = np.iinfo(np.int64).max


@dataclass(frozen=True)
class Block:
    """Consecutive users' events, oldest first: `columns` are `[N]`, `length` is `[R]`."""

    columns: dict[str, NDArray[Any]]  # item (1-based), timestamp (s), optionally event (code) and value
    length: NDArray[np.int64]
    # [N] nanoseconds beyond the timestamp; they order and cut the events and are not stored
    fraction: NDArray[np.integer[Any]] | None = None


@dataclass(frozen=True)
class FolderInput:
    """Contents of a data folder, in their final order."""

    recipe: str
    recipe_sha256: str
    split: Split
    users: pa.Array | pa.ChunkedArray  # [U] raw ids
    # V rows: raw, title, text, category (strings), optionally available_from (s), gone (bool)
    items: pa.Table
    blocks: Iterable[Block]  # at most `USERS_PER_MEMBER` users each
    features: Sequence[FeatureInput] = ()
    sources: Sequence[SourceEntry] = ()
    event_types: Sequence[str] = ()
    filtered: Mapping[str, int] = field(default_factory=dict)  # events read and events removed by each filter
    parent: ParentEntry | None = None  # the folder whose item ids were kept


def writing(path: Path) -> AbstractContextManager[None]:
    """Hold the lock of a data folder while it is changed; waits for another writer."""
    return holding(path, f"writing {path}", wait=True, on_error=partial(cannot_write, path))


@contextmanager
def staged(path: Path) -> Iterator[Path]:
    """Create a folder next to `path` that replaces it if the block ends without an error."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        staging, old = beside(path, "partial"), beside(path, "old")
    except OSError as error:
        raise cannot_write(path, error) from error
    try:
        staging.mkdir()
        yield staging
        with writing(path):
            if path.exists():
                path.rename(old)
            staging.rename(path)
    except OSError as error:
        if old.exists() and not path.exists():
            old.rename(path)
        raise cannot_write(path, error) from error
    finally:
        shutil.rmtree(staging, ignore_errors=True)
        shutil.rmtree(old, ignore_errors=True)


def undo_killed(path: Path) -> None:
    """Undo what a killed process did to replace `path`: restore the old folder if it had been moved."""
    moved = abandoned(path, "old")
    if moved and not path.exists():
        moved[0].rename(path)
    remove_abandoned(path, "old")
    remove_abandoned(path, "partial")


def cannot_write(path: Path, error: OSError) -> FindRecError:
    """The error for a data folder that cannot be written."""
    where = f" ({error.filename})" if error.filename else ""
    return FindRecError(
        f"cannot write the data folder {path}: {error.strerror or error}{where}. Choose a writable folder "
        "with enough space (data.folder, --folder or FINDREC_HOME)."
    )


@dataclass
class _EventCounts:
    """Counts and hashes of all events, gathered block by block."""

    num_items: int
    train_count: NDArray[np.int64]
    first_time: NDArray[np.int64]  # of each item's first event, or `_NO_TIME`
    hashers: dict[str, Any] = field(default_factory=dict)
    longest: int = 0
    train_events: int = 0
    repeats: int = 0
    tied: int = 0
    tied_last: int = 0
    duplicates: int = 0

    def add(
        self, block: Block, offset: NDArray[np.int64], split: Split
    ) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        """Add a block with the users' `offset` `[R+1]`; returns their `valid_start` and `test_start`."""
        item = block.columns["item"].astype(np.int64)
        timestamp = block.columns["timestamp"].astype(np.int64)
        if len(item) and (item.min() < 1 or item.max() > self.num_items):
            raise FindRecError(f"item ids must lie in 1..{self.num_items}, not {item.min()}..{item.max()}")
        row = np.repeat(np.arange(len(block.length)), block.length)
        if np.any((np.diff(timestamp) < 0) & (np.diff(row) == 0)):
            raise FindRecError("timestamps of a history must not decrease")
        valid_start, test_start = cut(split, timestamp, offset, block.fraction)
        training = np.arange(len(item)) - offset[row] < valid_start[row]
        np.add.at(self.train_count, item[training], 1)  # faster than a bincount over all items
        np.minimum.at(self.first_time, item, timestamp)
        pairs = row[training] * (self.num_items + 1) + item[training]
        self.train_events += len(pairs)
        self.repeats += len(pairs) - len(np.unique(pairs))
        begins = unit_starts(timestamp, offset, "timestamp")
        if block.fraction is not None:
            begins[1:] |= block.fraction[1:] != block.fraction[:-1]
        group = np.cumsum(begins) - 1
        sizes = np.bincount(group)
        self.tied += int(sizes[sizes > 1].sum())
        self.tied_last += int((sizes[group[offset[1:][block.length > 0] - 1]] > 1).sum())
        self.duplicates += _count_duplicates(group, item, block.columns.get("event"), sizes[group] > 1)
        self.longest = max(self.longest, int(block.length.max(initial=0)))
        for name, values in {"length": block.length, **block.columns}.items():
            dtype = DTYPES.get(name, "<i8")
            self.hashers.setdefault(name, hashlib.sha256()).update(values.astype(dtype).tobytes())
        return valid_start, test_start

    def digest(self, users: pa.Array | pa.ChunkedArray, items: pa.Table) -> str:
        """Hash of the canonical event table, independent of the blocks."""
        for name, values in (("users", users), ("items", items["raw"])):
            self.hashers[name] = hashlib.sha256()
            for begin in range(0, len(values), IDS_AT_ONCE):
                some = values.slice(begin, IDS_AT_ONCE).to_pylist()
                text = "\n".join(str(value) for value in some)
                self.hashers[name].update(("\n" if begin else "").encode() + text.encode())
        lines = [f"{name} {hasher.hexdigest()}" for name, hasher in sorted(self.hashers.items())]
        return hashlib.sha256("\n".join(lines).encode()).hexdigest()


def _count_duplicates(
    group: NDArray[np.int64], item: NDArray[np.int64], event: NDArray[Any] | None, tied: NDArray[np.bool_]
) -> int:
    """Number of `tied` events with the same item (and type) as an earlier event of their group."""
    group, item = group[tied], item[tied]
    if event is None:
        key = np.sort(group * (int(item.max(initial=0)) + 1) + item)
        return int((np.diff(key) == 0).sum())
    keys = (group, item, event[tied])
    order = np.lexsort(keys)
    return int(np.logical_and.reduce([np.diff(key[order]) == 0 for key in keys]).sum())


class _UsersTable:
    """Writes `users.parquet` incrementally."""

    def __init__(self, path: Path, raw: pa.Array | pa.ChunkedArray) -> None:
        columns = [("user", pa.int64()), ("raw", pa.string())]
        columns += [(name, pa.int64()) for name in _USER_COLUMNS]
        self._writer = pq.ParquetWriter(path, pa.schema(columns))
        self._raw = raw
        self._pending: list[dict[str, NDArray[Any]]] = []
        self._first = self._rows = 0

    def add(self, columns: dict[str, NDArray[Any]]) -> None:
        """Append the `_USER_COLUMNS` of the next users."""
        self._pending.append(columns)
        self._rows += len(columns["row"])
        if self._rows - self._first >= USERS_PER_GROUP:
            self._flush()

    def _flush(self) -> None:
        if not self._pending:
            return
        columns = {
            name: np.concatenate([part[name] for part in self._pending]).astype(np.int64)
            for name in _USER_COLUMNS
        }
        raw = self._raw.slice(self._first, self._rows - self._first)
        user = np.arange(self._first, self._rows)
        self._writer.write_table(pa.table({"user": user, "raw": raw, **columns}, schema=self._writer.schema))
        self._first, self._pending = self._rows, []

    def close(self) -> int:
        """Write the pending rows and return the number of users."""
        self._flush()
        self._writer.close()
        return self._rows


def _write_shards(
    staging: Path, contents: FolderInput, counts: _EventCounts, table: _UsersTable, shard_bytes: int
) -> tuple[list[ShardEntry], dict[str, str]]:
    """Write the blocks to shards; returns their entries and the dtype of each column."""
    (staging / "shards").mkdir()
    shards: list[ShardEntry] = []
    tar: TarWriter | None = None
    dtypes: dict[str, str] = {}
    name, first, users, events, member, key = "", 0, 0, 0, 0, 0

    def close(tar: TarWriter) -> None:
        tar.close()
        tar.stream.close()
        path = staging / name
        shards.append(
            ShardEntry(
                name=name,
                sha256=sha256_file(path),
                bytes=path.stat().st_size,
                first_user=first,
                users=users,
                events=events,
            )
        )

    for block in contents.blocks:
        if tar is None:
            first, users, events, member = first + users, 0, 0, 0
            name = f"shards/events-{len(shards):05d}.tar"
            # No owner and no time: the bytes depend on the arrays alone.
            tar = TarWriter((staging / name).open("wb"), user="", group="", mode=0o644, mtime=0)
        offset = np.concatenate([[0], np.cumsum(block.length)]).astype(np.int64)
        columns = {k: v.astype(DTYPES[k]) for k, v in block.columns.items()} | {"offset": offset}
        valid_start, test_start = counts.add(block, offset, contents.split)
        for column, values in columns.items():  # one call each: a call for all would sort them
            # Keys are unique: readers may join equal ones.
            tar.write({"__key__": f"{key:06d}", f"{column}.npy": values})
        dtypes = {k: v.dtype.name for k, v in columns.items()}
        rows = len(block.length)
        table.add(
            {
                "length": block.length,
                "valid_start": valid_start,
                "test_start": test_start,
                "shard": np.full(rows, len(shards)),
                "member": np.full(rows, member),
                "row": np.arange(rows),
            }
        )
        users, events, member, key = users + rows, events + int(offset[-1]), member + 1, key + 1
        if tar.tarstream.offset >= shard_bytes:
            close(tar)
            tar = None
    if tar is not None:
        close(tar)
    return shards, dtypes


def _with_times(items: pa.Table, first_time_V: NDArray[np.int64]) -> pa.Table:
    """Add or complete `available_from`: the earlier of the existing time and that of the first event."""
    first = pa.array(first_time_V, mask=first_time_V == _NO_TIME)
    if "available_from" not in items.column_names:
        return items.append_column("available_from", first)
    index = items.column_names.index("available_from")
    times = pc.min_element_wise(items["available_from"], first)  # ignores nulls
    return items.set_column(index, "available_from", times)


def write_folder(path: Path, contents: FolderInput, *, shard_bytes: int = SHARD_BYTES) -> Manifest:
    """Write a data folder; an existing one is replaced once the new one is complete."""
    with staged(path) as staging:
        num_items = contents.items.num_rows
        zeros = np.zeros(num_items + 1, dtype=np.int64)
        counts = _EventCounts(num_items, zeros, np.full_like(zeros, _NO_TIME))
        table = _UsersTable(staging / "users.parquet", contents.users)
        shards, dtypes = _write_shards(staging, contents, counts, table, shard_bytes)
        num_users = table.close()
        num_events = sum(shard.events for shard in shards)
        if not num_events:
            raise FindRecError(f"{contents.recipe}: no events are left to write")
        items = _with_times(contents.items, counts.first_time[1:])
        items = items.add_column(0, "item", pa.array(np.arange(1, num_items + 1)))
        items = items.append_column("train_count", pa.array(counts.train_count[1:]))
        pq.write_table(items, staging / "items.parquet")
        files = ["users.parquet", "items.parquet"]
        entries = []
        for feature in contents.features:
            entries.append(store_feature(staging, feature, f"features/{feature.modality}.safetensors"))
            files.append(entries[-1].file)
        manifest = Manifest(
            recipe=contents.recipe,
            recipe_sha256=contents.recipe_sha256,
            events_sha256=counts.digest(contents.users, contents.items),
            sources=list(contents.sources),
            num_users=num_users,
            num_items=num_items,
            num_events=num_events,
            longest=counts.longest,
            repeat_rate=counts.repeats / max(counts.train_events, 1),
            tie_rate=counts.tied / num_events,
            tied_last_rate=counts.tied_last / num_users,
            duplicates=counts.duplicates,
            split=contents.split.model_dump(mode="json", exclude_none=True),
            filtered=dict(contents.filtered),
            dtypes=dtypes,
            event_types=list(contents.event_types),
            shards=shards,
            features=entries,
            files={file: sha256_file(staging / file) for file in files},
            parent=contents.parent,
        )
        write_manifest(staging, manifest)
    return manifest
