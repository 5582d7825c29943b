"""The prepared data folder, opened for reading: per-user cuts in memory, histories and features on demand."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
from numpy.typing import NDArray

from findrec.datasets.features import FeatureTable
from findrec.datasets.manifest import Manifest, how_to_mend, read_manifest, sha256_file
from findrec.datasets.shards import ShardReader
from findrec.datasets.splits import Int64Array
from findrec.errors import FindRecError, suggest

ALWAYS, NEVER = np.iinfo(np.int64).min, np.iinfo(np.int64).max  # times before and after all others


@dataclass(frozen=True)
class Histories:
    """Events of some users: row r owns `offset[r]:offset[r+1]`, oldest first."""

    item: Int64Array  # [N] 1-based ids
    timestamp: Int64Array  # [N] seconds
    offset: Int64Array  # [R+1]
    event: Int64Array | None = None  # [N] codes of `Manifest.event_types`, -1 unknown; None: no such column

    def take(self, place: NDArray[np.intp], offset: Int64Array) -> Histories:
        """The events at `place`, cut into users by `offset`."""
        event = None if self.event is None else self.event[place]
        return Histories(self.item[place], self.timestamp[place], offset, event)


def _check_files(path: Path, manifest: Manifest, verify: bool) -> None:
    """Every file of the manifest is there with the right size and, with `verify`, the right sha256."""
    mend = how_to_mend(manifest.recipe)
    expected = {shard.name: (shard.sha256, shard.bytes) for shard in manifest.shards}
    expected |= {name: (digest, -1) for name, digest in manifest.files.items()}
    for name, (digest, size) in expected.items():
        if Path(name).is_absolute() or ".." in Path(name).parts:
            raise FindRecError(f"{path}/manifest.json names a file outside the folder: {name!r}. {mend}")
        file = path / name
        if not file.is_file():
            raise FindRecError(f"{file} is missing. {mend}")
        actual = file.stat().st_size
        if size >= 0 and actual != size:
            raise FindRecError(
                f"{file} was altered: it has {actual} bytes, manifest.json says {size}. {mend}"
            )
        if verify and sha256_file(file) != digest:
            raise FindRecError(f"{file} was altered: its sha256 is not the one in manifest.json. {mend}")


class DataFolder:
    """A prepared data set. Training events of a user are `[0, valid_start)`, validation targets
    `[valid_start, test_start)`, test targets `[test_start, length)`, counted from its first event.
    """

    def __init__(self, path: Path, manifest: Manifest) -> None:
        self.path = path
        self.manifest = manifest
        self.num_items = manifest.num_items
        self.num_users = manifest.num_users
        users = pq.read_table(
            path / "users.parquet", columns=["shard", "member", "row", "length", "valid_start", "test_start"]
        )
        self._shard, self._member, self._row, self.length, self.valid_start, self.test_start = (
            column.to_numpy().astype(np.int64) for column in users.columns
        )
        self._readers: dict[int, ShardReader] = {}
        self._features: dict[str, FeatureTable] = {}

    @staticmethod
    def open(path: Path, *, verify: bool = True) -> DataFolder:
        """Open a folder made by `prepare` or `write_data_folder`.

        `verify` hashes every file (about 1 GB/s); without it only presence and sizes are checked, which is
        enough where another process of the same run has verified already. `FindRecError` names the file
        that is missing or altered.
        """
        path = Path(path)
        manifest = read_manifest(path)
        _check_files(path, manifest, verify)
        return DataFolder(path, manifest)

    @cached_property
    def items(self) -> pa.Table:
        """V rows in id order: item, raw, title, text, category, available_from, train_count; image and gone
        where they are known.
        """
        return pq.read_table(self.path / "items.parquet")

    @cached_property
    def train_count(self) -> Int64Array:
        """`[V+1]` occurrences of each item in training events; 0 for padding."""
        counts = pq.read_table(self.path / "items.parquet", columns=["train_count"]).column(0)
        return np.concatenate([[0], counts.to_numpy()]).astype(np.int64)

    @cached_property
    def available_from(self) -> Int64Array:
        """`[V+1]` the time (s) from which each item may be recommended, `ALWAYS` where none is known.

        That is the time the recipe gives, or of the item's first event where that is earlier.
        """
        if (times := self.item_column("available_from")) is not None:
            return np.concatenate([[ALWAYS], pc.fill_null(times, ALWAYS).to_numpy()]).astype(np.int64)
        first = np.full(self.num_items + 1, NEVER)  # made before folders kept it
        for block in self.blocks():
            np.minimum.at(first, block.item, block.timestamp)
        return np.where(first == NEVER, ALWAYS, first)

    @cached_property
    def gone(self) -> NDArray[np.bool_]:
        """`[V+1]` items that a grown folder keeps for their ids only: never candidates."""
        if (gone := self.item_column("gone")) is None:
            return np.zeros(self.num_items + 1, dtype=bool)
        return np.concatenate([[False], gone.to_numpy()]).astype(bool)

    def item_column(self, column: str) -> pa.ChunkedArray | None:
        """One column of `items.parquet` without the others, None where it has no such column."""
        path = self.path / "items.parquet"
        there = column in pq.read_schema(path).names
        return pq.read_table(path, columns=[column]).column(0) if there else None

    @cached_property
    def user_ids(self) -> list[str]:
        """Raw id of each user row."""
        raw: list[str] = pq.read_table(self.path / "users.parquet", columns=["raw"]).column(0).to_pylist()
        return raw

    @property
    def modalities(self) -> list[str]:
        """Names of the feature tables."""
        return [entry.modality for entry in self.manifest.features]

    def feature(self, modality: str) -> FeatureTable:
        """The feature table of one modality."""
        if modality not in self._features:
            files = {entry.modality: entry.file for entry in self.manifest.features}
            if modality not in files:
                raise FindRecError(
                    f"{self.path} has no features of modality {modality!r}"
                    f"{suggest(modality, files)} (there: {', '.join(files) or 'none'})"
                )
            table = FeatureTable(self.path / files[modality], modality)
            if len(table) != self.num_items + 1:
                raise FindRecError(
                    f"{self.path / files[modality]} has {len(table)} rows for {self.num_items} items. "
                    f"{how_to_mend(self.manifest.recipe)}"
                )
            self._features[modality] = table
        return self._features[modality]

    def _reader(self, shard: int) -> ShardReader:
        if shard not in self._readers:
            try:
                self._readers[shard] = ShardReader(self.path / self.manifest.shards[shard].name)
            except (OSError, ValueError) as error:
                if isinstance(error, FindRecError):
                    raise
                name = self.path / self.manifest.shards[shard].name
                raise FindRecError(
                    f"cannot read {name}: {error}. {how_to_mend(self.manifest.recipe)}"
                ) from None
        return self._readers[shard]

    def histories(
        self,
        rows: Int64Array | Sequence[int],
        start: Int64Array | None = None,
        stop: Int64Array | None = None,
    ) -> Histories:
        """Events of the users `rows` `[R]`, or of each only the events `[start, stop)`.

        Random access through the mapped shards: only the pages that hold these events are read.
        """
        rows = np.asarray(rows, dtype=np.int64)
        start = np.zeros(len(rows), dtype=np.int64) if start is None else start
        stop = self.length[rows] if stop is None else stop
        if np.any(start < 0) or np.any(stop > self.length[rows]) or np.any(stop < start):
            raise IndexError("a slice reaches outside its user's history")
        offset = np.concatenate([[0], np.cumsum(stop - start)]).astype(np.int64)
        item = np.empty(offset[-1], dtype=np.int64)
        timestamp = np.empty(offset[-1], dtype=np.int64)
        event = np.empty(offset[-1], dtype=np.int64) if self.manifest.event_types else None
        for r, user in enumerate(rows):
            sample = self._reader(int(self._shard[user])).samples[self._member[user]]
            base = sample["offset"][self._row[user]]
            cut = slice(base + start[r], base + stop[r])
            item[offset[r] : offset[r + 1]] = sample["item"][cut]
            timestamp[offset[r] : offset[r + 1]] = sample["timestamp"][cut]
            if event is not None:
                event[offset[r] : offset[r + 1]] = sample["event"][cut]
        return Histories(item, timestamp, offset, event)

    def blocks(self) -> Iterator[Histories]:
        """All histories in user order, as they are packed: at most a few hundred users at a time.

        The arrays are views of the mapped shards: one pass over any folder takes little memory.
        """
        for place in range(len(self.manifest.shards)):
            for sample in self._reader(place).samples:
                yield Histories(sample["item"], sample["timestamp"], sample["offset"], sample.get("event"))
            del self._readers[place]  # so that a pass does not keep every shard mapped
