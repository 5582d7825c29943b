"""Random access to the histories of packed shards.

Events are copied directly from the mapped files, so only the pages that hold them are read. Shards are
checked against the users' table when first opened, and item ids and the order of timestamps at each read, so
that an invalid file from elsewhere gives an error instead of a wrong batch.
"""

from __future__ import annotations

import ctypes
import itertools
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from findrec.datasets.folder._native import (
    BAD_ITEM,
    BAD_SLICE,
    BAD_TIME,
    PROBLEMS,
    GatherArgs,
    Impl,
    contiguous_int64,
    native,
    pointer,
)
from findrec.datasets.folder.histories import Histories
from findrec.datasets.folder.manifest import Manifest, repair_hint
from findrec.datasets.folder.shards import ShardReader
from findrec.datasets.folder.splits import Int64Array
from findrec.errors import FindRecError

COLUMNS = ("item", "timestamp", "event")
OPEN_ATTEMPTS = 10  # another process may drop a shard from a shared cache before it is opened


@dataclass(frozen=True)
class UserTable:
    """Location and split of each user's history; all arrays are `[U]`."""

    shard: Int64Array
    member: Int64Array  # sample within the shard
    row: Int64Array  # user within the sample
    length: Int64Array
    valid_start: Int64Array
    test_start: Int64Array

    def problem(self, manifest: Manifest) -> str | None:
        """Why the table does not match the manifest, or None if it does."""
        columns = {"item", "timestamp", "offset", *(["event"] if manifest.event_types else [])}
        if not columns <= set(manifest.dtypes):
            return f"users of shards that have no {', '.join(sorted(columns - set(manifest.dtypes)))}"
        if len(self.length) != manifest.num_users or int(self.length.sum()) != manifest.num_events:
            return f"{len(self.length)} users with {int(self.length.sum())} events"
        first = self.row == 0
        same = ~first[1:]
        if len(first) and not (
            first[0]
            and self.shard[0] == 0
            and self.member[0] == 0
            and np.array_equal(np.diff(self.row)[same], np.ones(same.sum()))
            and not np.diff(self.shard)[same].any()
            and not np.diff(self.member)[same].any()
            and _are_consecutive(self.shard[first], self.member[first])
        ):
            return "users that are not in the order of their shards"
        counts = np.bincount(self.shard, minlength=len(manifest.shards))
        if counts.tolist() != [entry.users for entry in manifest.shards]:
            return "different numbers of users in the shards"
        cuts = (np.zeros_like(self.length), self.valid_start, self.test_start, self.length)
        if any(np.any(a > b) for a, b in itertools.pairwise(cuts)):
            return "a split outside its history"
        return None


def _are_consecutive(shard: Int64Array, member: Int64Array) -> bool:
    """Whether samples are numbered 0, 1, ... within each shard, and shards are in order."""
    next_shard = np.diff(shard)
    step = np.where(next_shard == 0, np.diff(member) == 1, (next_shard == 1) & (member[1:] == 0))
    return bool(step.all())


class PackedHistories:
    """The histories of a data folder's users; thread-safe."""

    def __init__(
        self,
        manifest: Manifest,
        users: UserTable,
        fetch: Callable[[int], Path],
        *,
        mapped_bytes: int | None = None,
    ) -> None:
        """Shards are opened when needed, from the verified file that `fetch` returns for a shard's number.

        `mapped_bytes` bounds the mapped shards (at least one); the least recently used are closed first.
        """
        self._manifest, self._fetch = manifest, fetch
        self._length, self._limit = contiguous_int64(users.length), contiguous_int64(users.valid_start)
        first_user = np.flatnonzero(users.row == 0)  # of each sample
        self._first_user = np.append(first_user, len(users.row))
        self._sample = contiguous_int64(np.cumsum(users.row == 0) - 1)
        before = np.cumsum(users.length) - users.length
        self._first = contiguous_int64(
            before - before[first_user][self._sample]
        )  # first event within the sample
        self._shard = users.shard[first_user]  # of each sample
        self._member = users.member[first_user]
        self._address = np.zeros((len(COLUMNS), len(first_user)), dtype=np.int64)
        self._arguments = {
            "users": len(users.row),
            "num_items": manifest.num_items,
            "sample_of": pointer(self._sample),
            "first_of": pointer(self._first),
            **{f"{name}_at": pointer(self._address[c]) for c, name in enumerate(COLUMNS)},
        }
        self._pointers = {"end_of": pointer(self._length), "training_end_of": pointer(self._limit)}
        total = sum(entry.bytes for entry in manifest.shards)
        self._mapped_bytes = None if mapped_bytes is None or mapped_bytes >= total else mapped_bytes
        self._readers: dict[int, ShardReader] = {}  # the most recently used last
        self._lock = threading.RLock()

    def shards_of(self, users: Int64Array) -> Int64Array:
        """`[R]` the shard of each user."""
        return self._shard[self._sample[users]]

    def gather(
        self,
        users: Int64Array,
        start: Int64Array,
        stop: Int64Array,
        *,
        tie_seed: int | None = None,
        impl: Impl = "auto",
    ) -> Histories:
        """Events `[start, stop)` of each of the users `[R]`; see `DataFolder.histories`.

        Raises `IndexError` for a slice outside its history, and `FindRecError` for invalid events.
        """
        users, start, stop = contiguous_int64(users), contiguous_int64(start), contiguous_int64(stop)
        offset = np.zeros(len(users) + 1, dtype=np.int64)
        np.cumsum(stop - start, out=offset[1:])
        count = int(offset[-1])
        if count < 0:
            raise _slice_error()
        event = np.empty(count, dtype=np.int64) if self._manifest.event_types else None
        out = Histories(np.empty(count, np.int64), np.empty(count, np.int64), offset, event)
        with self._lock:
            for rows in self._opened(users):
                self._fill(out, rows, users, start, stop, tie_seed, native(impl))
        return out

    def _opened(self, users: Int64Array) -> Iterator[slice | NDArray[np.intp]]:
        """Groups of rows whose shards are open until the next group is requested."""
        if self._mapped_bytes is not None:
            shard = self.shards_of(users)
            for number in np.unique(shard).tolist():
                self.reader(number)
                yield np.flatnonzero(shard == number)
            return
        if len(self._readers) < len(self._manifest.shards):
            for number in np.unique(self.shards_of(users)).tolist():
                self.reader(number)
        yield slice(None)

    def _fill(
        self,
        out: Histories,
        rows: slice | NDArray[np.intp],
        users: Int64Array,
        start: Int64Array,
        stop: Int64Array,
        tie_seed: int | None,
        library: ctypes.CDLL | None,
    ) -> None:
        position = out.offset[:-1][rows]
        users, start, stop = users[rows], start[rows], stop[rows]
        if library is None:
            return self._fill_reference(out, position, users, start, stop, tie_seed)
        arguments = GatherArgs(
            rows=len(users),
            shuffle=tie_seed is not None,
            seed=(tie_seed or 0) % 2**64,
            user=pointer(users),
            start=pointer(start),
            stop=pointer(stop),
            place=pointer(position),
            end_of=self._pointers["end_of" if tie_seed is None else "training_end_of"],
            item=pointer(out.item),
            timestamp=pointer(out.timestamp),
            event=pointer(out.event),
            **self._arguments,
        )
        row, problem = divmod(library.gather_histories(ctypes.byref(arguments)), PROBLEMS)
        if problem:
            raise self._invalid(int(users[row]), problem)

    def _fill_reference(
        self,
        out: Histories,
        position: Int64Array,
        users: Int64Array,
        start: Int64Array,
        stop: Int64Array,
        tie_seed: int | None,
    ) -> None:
        last = (self._length if tie_seed is None else self._limit)[users]
        if len(users) and (users.min() < 0 or not np.all((start >= 0) & (start <= stop) & (stop <= last))):
            raise _slice_error()
        for target, user, begin, end in zip(position, users.tolist(), start, stop, strict=True):
            number = self._sample[user]
            sample = self.reader(int(self._shard[number])).samples[self._member[number]]
            times = sample["timestamp"][self._first[user] :]
            order = np.arange(begin, end)
            if tie_seed is not None:
                training = np.arange(self._limit[user])
                keys = tie_keys(tie_seed, np.full_like(training, user), training)
                order = np.lexsort((keys, times[: len(training)]))[begin:end]
            to = slice(target, target + end - begin)
            for name, values in (("item", out.item), ("timestamp", out.timestamp), ("event", out.event)):
                if values is not None:
                    values[to] = sample[name][self._first[user] + order]
            if end > begin and not 1 <= out.item[to].min() <= out.item[to].max() <= self._manifest.num_items:
                raise self._invalid(user, BAD_ITEM)
            if np.any(np.diff(out.timestamp[to]) < 0):
                raise self._invalid(user, BAD_TIME)

    def reader(self, shard: int) -> ShardReader:
        """Return an open shard; it is checked against the users' table when it is opened."""
        with self._lock:
            if shard in self._readers:
                self._readers[shard] = self._readers.pop(shard)
                return self._readers[shard]
            if self._mapped_bytes is not None:
                size = self._manifest.shards[shard].bytes
                while self._readers and size + self._open_bytes() > self._mapped_bytes:
                    self.close(next(iter(self._readers)))
            reader = self._open(shard)
            numbers = np.flatnonzero(self._shard == shard)
            self._check(reader, numbers)
            for number, sample in zip(numbers, reader.samples, strict=True):
                for c, name in enumerate(COLUMNS):
                    self._address[c, number] = pointer(sample.get(name)) or 0
            self._readers[shard] = reader
            return reader

    def _open(self, shard: int) -> ShardReader:
        for _ in range(OPEN_ATTEMPTS):
            path = self._fetch(shard)
            try:
                return ShardReader(path, self._manifest.dtypes, hint=repair_hint(self._manifest.recipe))
            except FindRecError:
                if path.is_file():
                    raise
        raise FindRecError(f"{path} was removed while it was opened. {repair_hint(self._manifest.recipe)}")

    def close(self, shard: int) -> None:
        """Unmap a shard; it is opened again when needed."""
        with self._lock:
            self._address[:, self._shard == shard] = 0
            self._readers.pop(shard, None)

    def blocks(self) -> Iterator[Histories]:
        """All histories in user order, one sample at a time, as views of the mapped shards."""
        for shard in range(len(self._manifest.shards)):
            was_open = shard in self._readers
            reader = self.reader(shard)
            for sample in reader.samples:
                yield Histories(sample["item"], sample["timestamp"], sample["offset"], sample.get("event"))
            if not was_open:
                self.close(shard)

    def _open_bytes(self) -> int:
        return sum(self._manifest.shards[shard].bytes for shard in self._readers)

    def _check(self, reader: ShardReader, numbers: NDArray[np.intp]) -> None:
        if len(reader.samples) != len(numbers):
            raise reader.error(f"it has {len(reader.samples)} samples, users.parquet has {len(numbers)}")
        for number, key, sample in zip(numbers, reader.keys, reader.samples, strict=True):
            length = self._length[self._first_user[number] : self._first_user[number + 1]]
            offset = sample["offset"]
            if len(offset) != len(length) + 1 or offset[0] or not np.array_equal(np.diff(offset), length):
                raise reader.error(f"the users of sample {key} differ from those of users.parquet")
            if any(len(values) != offset[-1] for name, values in sample.items() if name != "offset"):
                raise reader.error(f"the columns of sample {key} differ in length")

    def _invalid(self, user: int, problem: int) -> Exception:
        """The error for an error code of the reader."""
        if problem == BAD_SLICE:
            return _slice_error()
        assert problem in (BAD_ITEM, BAD_TIME), "shards are opened before they are read"
        number = self._sample[user]
        reader = self.reader(int(self._shard[number]))
        key = reader.keys[self._member[number]]
        if problem == BAD_ITEM:
            reason = f"an item of user row {user} lies outside the catalogue 1..{self._manifest.num_items}"
        else:
            reason = f"the timestamps of user row {user} decrease"
        return reader.error(f"in sample {key} {reason}")


def _slice_error() -> IndexError:
    return IndexError("a slice reaches outside its user's history")


def tie_keys(seed: int, user: NDArray[np.int64], position: NDArray[np.int64]) -> NDArray[np.uint64]:
    """Pseudo-random sort keys that depend only on seed, user and position (finaliser of splitmix64)."""
    key = np.uint64(seed % 2**64) + user.astype(np.uint64) * np.uint64(0x9E3779B97F4A7C15)
    key = key + position.astype(np.uint64) * np.uint64(0xD1B54A32D192ED03)
    for shift, factor in ((30, 0xBF58476D1CE4E5B9), (27, 0x94D049BB133111EB)):
        key = (key ^ (key >> np.uint64(shift))) * np.uint64(factor)
    return key ^ (key >> np.uint64(31))
