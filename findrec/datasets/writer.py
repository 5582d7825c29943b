"""Writes a data folder whole or not at all.

Everything goes into a sibling folder that is renamed at the very end, after its manifest. Whatever stops
the work (a crash, a full disk, no permission) leaves the old folder, or none, but never half of one.
"""

from __future__ import annotations

import glob
import hashlib
import os
import shutil
import socket
import tarfile
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
from numpy.typing import NDArray

from findrec.datasets.features import FeatureInput, store_feature
from findrec.datasets.manifest import (
    Manifest,
    ParentEntry,
    ShardEntry,
    SourceEntry,
    sha256_file,
    write_manifest,
)
from findrec.datasets.shards import DTYPES, append_sample, open_for_writing
from findrec.datasets.splits import Split, cut, unit_starts
from findrec.errors import FindRecError

USERS_PER_MEMBER = 512
SHARD_BYTES = 64 << 20  # a shard is closed once it is larger
USERS_PER_GROUP = 1 << 20  # of users.parquet
IDS_AT_ONCE = 1 << 16  # that are hashed
_PLACES = ("length", "valid_start", "test_start", "shard", "member", "row")  # int64 columns of users.parquet
_NO_TIME = np.iinfo(np.int64).max


@dataclass(frozen=True)
class Block:
    """Consecutive users' events, oldest first: `columns` are `[N]`, `length` is `[R]`."""

    columns: dict[str, NDArray[Any]]  # item (1-based), timestamp (s), optionally event (code) and value
    length: NDArray[np.int64]


@dataclass(frozen=True)
class FolderInput:
    """What a data folder is made of, in its final order."""

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
    filtered: Mapping[str, int] = field(default_factory=dict)  # events read and left out, by filter
    parent: ParentEntry | None = None  # the folder whose item ids were kept


def beside(path: Path, kind: str) -> Path:
    """A hidden sibling of `path` for this process's work. What processes of this machine that ended without
    tidying up have left there is removed.
    """
    stem = f".{path.name}.{kind}-{socket.gethostname()}-"
    for left in path.parent.glob(f"{glob.escape(stem)}*"):
        pid = left.name.removeprefix(stem)
        if pid.isdigit() and (int(pid) == os.getpid() or not _alive(int(pid))):
            shutil.rmtree(left, ignore_errors=True)
    return path.parent / f"{stem}{os.getpid()}"


def _alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        return True
    return True


@contextmanager
def staged(path: Path) -> Iterator[Path]:
    """A new folder beside `path` that takes its place when the block ends without an error."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        staging, old = beside(path, "partial"), beside(path, "old")
    except OSError as error:
        raise cannot_write(path, error) from error
    try:
        staging.mkdir()
        yield staging
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


def cannot_write(path: Path, error: OSError) -> FindRecError:
    """What the user is told where a data folder cannot be written."""
    where = f" ({error.filename})" if error.filename else ""
    return FindRecError(
        f"cannot write the data folder {path}: {error.strerror or error}{where}. Give a folder that you may "
        "write to, with enough space (data.folder, --folder or FINDREC_HOME)."
    )


@dataclass
class _Tally:
    """Counts and hashes gathered while the blocks stream past."""

    num_items: int
    train_count: NDArray[np.int64]
    first_time: NDArray[np.int64]  # of each item's first event; `_NO_TIME` without one
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
        """Take in a block whose users start at `offset`; returns where their validation and test begin."""
        item = block.columns["item"].astype(np.int64)
        timestamp = block.columns["timestamp"].astype(np.int64)
        if len(item) and (item.min() < 1 or item.max() > self.num_items):
            raise FindRecError(f"item ids must lie in 1..{self.num_items}, found {item.min()}..{item.max()}")
        row = np.repeat(np.arange(len(block.length)), block.length)
        if np.any((np.diff(timestamp) < 0) & (np.diff(row) == 0)):
            raise FindRecError("timestamps of a history must not go backwards")
        valid_start, test_start = cut(split, timestamp, offset)
        training = np.arange(len(item)) - offset[row] < valid_start[row]
        np.add.at(self.train_count, item[training], 1)  # a bincount would cost all items in every block
        np.minimum.at(self.first_time, item, timestamp)
        pairs = row[training] * (self.num_items + 1) + item[training]
        self.train_events += len(pairs)
        self.repeats += len(pairs) - len(np.unique(pairs))
        group = np.cumsum(unit_starts(timestamp, offset, "timestamp")) - 1
        sizes = np.bincount(group)
        self.tied += int(sizes[sizes > 1].sum())
        self.tied_last += int((sizes[group[offset[1:][block.length > 0] - 1]] > 1).sum())
        self.duplicates += _repeated(group, item, block.columns.get("event"), sizes[group] > 1)
        self.longest = max(self.longest, int(block.length.max(initial=0)))
        for name, values in {"length": block.length, **block.columns}.items():
            dtype = DTYPES.get(name, "<i8")
            self.hashers.setdefault(name, hashlib.sha256()).update(values.astype(dtype).tobytes())
        return valid_start, test_start

    def digest(self, users: pa.Array | pa.ChunkedArray, items: pa.Table) -> str:
        """Hash of the canonical event table, the same however it was cut into blocks."""
        for name, values in (("users", users), ("items", items["raw"])):
            self.hashers[name] = hashlib.sha256()
            for begin in range(0, len(values), IDS_AT_ONCE):
                some = values.slice(begin, IDS_AT_ONCE).to_pylist()
                text = "\n".join(str(value) for value in some)
                self.hashers[name].update(("\n" if begin else "").encode() + text.encode())
        lines = [f"{name} {hasher.hexdigest()}" for name, hasher in sorted(self.hashers.items())]
        return hashlib.sha256("\n".join(lines).encode()).hexdigest()


def _repeated(
    group: NDArray[np.int64], item: NDArray[np.int64], event: NDArray[Any] | None, tied: NDArray[np.bool_]
) -> int:
    """How many of the `tied` events have the item (and type) of an earlier one of their group."""
    group, item = group[tied], item[tied]
    if event is None:
        key = np.sort(group * (int(item.max(initial=0)) + 1) + item)
        return int((np.diff(key) == 0).sum())
    keys = (group, item, event[tied])
    order = np.lexsort(keys)
    return int(np.logical_and.reduce([np.diff(key[order]) == 0 for key in keys]).sum())


class _UsersTable:
    """`users.parquet`, written as the users come."""

    def __init__(self, path: Path, raw: pa.Array | pa.ChunkedArray) -> None:
        columns = [("user", pa.int64()), ("raw", pa.string()), *((name, pa.int64()) for name in _PLACES)]
        self._writer = pq.ParquetWriter(path, pa.schema(columns))
        self._raw = raw
        self._waiting: list[dict[str, NDArray[Any]]] = []
        self._first = self._rows = 0

    def add(self, places: dict[str, NDArray[Any]]) -> None:
        """The next users' `_PLACES`."""
        self._waiting.append(places)
        self._rows += len(places["row"])
        if self._rows - self._first >= USERS_PER_GROUP:
            self._flush()

    def _flush(self) -> None:
        if not self._waiting:
            return
        columns = {k: np.concatenate([p[k] for p in self._waiting]).astype(np.int64) for k in _PLACES}
        raw = self._raw.slice(self._first, self._rows - self._first)
        user = np.arange(self._first, self._rows)
        self._writer.write_table(pa.table({"user": user, "raw": raw, **columns}, schema=self._writer.schema))
        self._first, self._waiting = self._rows, []

    def close(self) -> int:
        """Write what is waiting and return the number of users."""
        self._flush()
        self._writer.close()
        return self._rows


def _write_shards(
    staging: Path, given: FolderInput, tally: _Tally, table: _UsersTable, shard_bytes: int
) -> tuple[list[ShardEntry], dict[str, str]]:
    """Stream the blocks into tars; returns their entries and the dtype of each column."""
    (staging / "shards").mkdir()
    shards: list[ShardEntry] = []
    tar: tarfile.TarFile | None = None
    dtypes: dict[str, str] = {}
    name, first, users, events, member, key = "", 0, 0, 0, 0, 0

    def close(tar: tarfile.TarFile) -> None:
        tar.close()
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

    for block in given.blocks:
        if tar is None:
            first, users, events, member = first + users, 0, 0, 0
            name = f"shards/events-{len(shards):05d}.tar"
            tar = open_for_writing(staging / name)
        offset = np.concatenate([[0], np.cumsum(block.length)]).astype(np.int64)
        columns = {k: v.astype(DTYPES[k]) for k, v in block.columns.items()} | {"offset": offset}
        valid_start, test_start = tally.add(block, offset, given.split)
        append_sample(tar, key, columns)  # keys run on: readers may join equal ones
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
        if tar.offset >= shard_bytes:
            close(tar)
            tar = None
    if tar is not None:
        close(tar)
    return shards, dtypes


def _with_times(items: pa.Table, first_time_V: NDArray[np.int64]) -> pa.Table:
    """The items with `available_from`: the time given for each, or that of its first event where that is
    earlier (an event shows that the item was on offer) or none is given; null where there is neither.
    """
    first = pa.array(first_time_V, mask=first_time_V == _NO_TIME)
    if "available_from" not in items.column_names:
        return items.append_column("available_from", first)
    given = items["available_from"]
    place = items.column_names.index("available_from")
    return items.set_column(place, "available_from", pc.min_element_wise(given, first))


def write_folder(path: Path, given: FolderInput, *, shard_bytes: int = SHARD_BYTES) -> Manifest:
    """Write the data folder at `path`, replacing what is there only once the new one is complete."""
    with staged(path) as staging:
        num_items = given.items.num_rows
        zeros = np.zeros(num_items + 1, dtype=np.int64)
        tally = _Tally(num_items, zeros, np.full_like(zeros, _NO_TIME))
        table = _UsersTable(staging / "users.parquet", given.users)
        shards, dtypes = _write_shards(staging, given, tally, table, shard_bytes)
        num_users = table.close()
        num_events = sum(shard.events for shard in shards)
        if not num_events:
            raise FindRecError(f"{given.recipe}: no events are left to write")
        items = _with_times(given.items, tally.first_time[1:])
        items = items.add_column(0, "item", pa.array(np.arange(1, num_items + 1)))
        items = items.append_column("train_count", pa.array(tally.train_count[1:]))
        pq.write_table(items, staging / "items.parquet")
        files = ["users.parquet", "items.parquet"]
        entries = []
        for feature in given.features:
            entries.append(store_feature(staging, feature, f"features/{feature.modality}.safetensors"))
            files.append(entries[-1].file)
        manifest = Manifest(
            recipe=given.recipe,
            recipe_sha256=given.recipe_sha256,
            events_sha256=tally.digest(given.users, given.items),
            sources=list(given.sources),
            num_users=num_users,
            num_items=num_items,
            num_events=num_events,
            longest=tally.longest,
            repeat_rate=tally.repeats / max(tally.train_events, 1),
            tie_rate=tally.tied / num_events,
            tied_last_rate=tally.tied_last / num_users,
            duplicates=tally.duplicates,
            split=given.split.model_dump(mode="json", exclude_none=True),
            filtered=dict(given.filtered),
            dtypes=dtypes,
            event_types=list(given.event_types),
            shards=shards,
            features=entries,
            files={file: sha256_file(staging / file) for file in files},
            parent=given.parent,
        )
        write_manifest(staging, manifest)
    return manifest
