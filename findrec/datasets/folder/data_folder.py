"""Read a data folder: the users' table is kept in memory, histories and features are read on demand."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from functools import cached_property
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
from numpy.typing import NDArray

from findrec.datasets.folder._native import Impl
from findrec.datasets.folder.features import FeatureTable
from findrec.datasets.folder.histories import Histories
from findrec.datasets.folder.manifest import MANIFEST_NAME, Manifest, read_manifest, repair_hint
from findrec.datasets.folder.packed import PackedHistories, UserTable
from findrec.datasets.folder.remote import RemoteFolder, is_remote
from findrec.datasets.folder.splits import Int64Array
from findrec.datasets.folder.tables import ITEMS_FILE, USERS_FILE, column_names, read_table, reading
from findrec.errors import FindRecError, suggest
from findrec.files import sha256_file

# The columns of items.parquet with a meaning of their own; any others are the user's.
ITEM_COLUMNS = ("item", "raw", "title", "text", "category", "image", "available_from", "gone", "train_count")
_PART = r"[A-Za-z0-9_][^/\\:\0]*"
_NAME = re.compile(rf"{_PART}(/{_PART})*")  # no absolute paths, `..`, drives or URLs
ALWAYS, NEVER = np.iinfo(np.int64).min, np.iinfo(np.int64).max  # times before and after all others


def further_columns(names: Sequence[str]) -> list[str]:
    """The columns of the items SQL other than those with a meaning of their own, such as price or brand."""
    return [name for name in names if name not in ITEM_COLUMNS]


def _check_names(location: str, manifest: Manifest) -> None:
    names = [shard.name for shard in manifest.shards]
    names += [*manifest.files, *(entry.file for entry in manifest.features)]
    for name in names:
        if _NAME.fullmatch(name) is None:
            raise FindRecError(
                f"{location}/{MANIFEST_NAME} names a file outside the folder: {name!r}. "
                f"{repair_hint(manifest.recipe)}"
            )


def _check_listed(location: str, manifest: Manifest) -> None:
    """Check that the manifest has the sha256 of every file that is read."""
    for name in (ITEMS_FILE, USERS_FILE, *(entry.file for entry in manifest.features)):
        if name not in manifest.files:
            raise FindRecError(
                f"{location}/{MANIFEST_NAME} does not list {name}, so that file is not trusted. "
                f"{repair_hint(manifest.recipe)}"
            )


def _check_files(path: Path, manifest: Manifest, verify: bool) -> None:
    """Check that every file of the manifest exists with the right size and, with `verify`, sha256."""
    hint = repair_hint(manifest.recipe)
    expected = {shard.name: (shard.sha256, shard.bytes) for shard in manifest.shards}
    expected |= {name: (digest, -1) for name, digest in manifest.files.items()}
    for name, (digest, size) in expected.items():
        file = path / name
        if not file.is_file():
            raise FindRecError(f"{file} is missing. {hint}")
        actual = file.stat().st_size
        if size >= 0 and actual != size:
            raise FindRecError(
                f"{file} was altered: it has {actual} bytes, manifest.json says {size}. {hint}"
            )
        if verify and sha256_file(file) != digest:
            raise FindRecError(f"{file} was altered: its sha256 is not the one in manifest.json. {hint}")


class DataFolder:
    """A prepared data set.

    A user's training events are `[0, valid_start)`, validation targets `[valid_start, test_start)` and test
    targets `[test_start, length)`, counted from the user's first event; all three are `[U]`.
    """

    def __init__(self, path: Path, manifest: Manifest, *, remote: RemoteFolder | None = None) -> None:
        self.path = path  # local folder of all files except remote shards
        # Argument for `open`, also on other machines.
        self.location = str(path) if remote is None else remote.url
        self._remote = remote
        self.manifest = manifest
        self.num_items = manifest.num_items
        self.num_users = manifest.num_users
        users = _user_table(path, manifest)
        self.length, self.valid_start, self.test_start = users.length, users.valid_start, users.test_start
        if remote is None:
            self._packed = PackedHistories(manifest, users, lambda s: path / manifest.shards[s].name)
        else:
            self._packed = PackedHistories(manifest, users, remote.shard, mapped_bytes=remote.cache_bytes)
        self._features: dict[str, FeatureTable] = {}

    @staticmethod
    def open(location: Path | str, *, verify: bool = True, cache_bytes: int | None = None) -> DataFolder:
        """Open a folder made by `prepare` or `write_data_folder`.

        Args:
            location: Local path or URL (http, https, s3, gs).
            verify: Hash every file (about 1 GB/s). Otherwise only existence and sizes are checked, which is
                enough if another process of the run has verified the files.
            cache_bytes: Cache size for remote shards, which are fetched and verified when needed; default:
                `FINDREC_CACHE_BYTES`, or else 64 GiB.

        Raises:
            FindRecError: If a file is missing or altered.
        """
        if is_remote(location):
            remote = RemoteFolder(str(location), cache_bytes)
            _check_names(remote.url, remote.manifest)
            _check_listed(remote.url, remote.manifest)
            remote.fetch_tables(verify=verify)
            return DataFolder(remote.path, remote.manifest, remote=remote)
        path = Path(location)
        manifest = read_manifest(path)
        _check_names(str(path), manifest)
        _check_listed(str(path), manifest)
        _check_files(path, manifest, verify)
        return DataFolder(path, manifest)

    @property
    def remote(self) -> bool:
        """Whether the shards are remote."""
        return self._remote is not None

    def read_ahead(self, users: Int64Array) -> None:
        """Prefetch the remote shards of `users`, given in the order in which their histories will be read."""
        if self._remote is not None:
            shards, first = np.unique(self._packed.shards_of(users), return_index=True)
            self._remote.prefetch(shards[np.argsort(first)].tolist())

    def num_shards_of(self, users: Int64Array) -> int:
        """Number of shards with the histories of these users."""
        return len(np.unique(self._packed.shards_of(users)))

    @cached_property
    def items(self) -> pa.Table:
        """V rows in id order: item, raw, title, text, category, available_from, train_count.

        The columns image and gone are optional; others come from the items SQL.
        """
        return read_table(self.path, ITEMS_FILE, self.manifest)

    @cached_property
    def train_count(self) -> Int64Array:
        """`[V+1]` occurrences of each item in training events; 0 for padding."""
        counts = read_table(self.path, ITEMS_FILE, self.manifest, ["train_count"]).column(0)
        with reading(self.path / ITEMS_FILE, self.manifest):
            return np.concatenate([[0], counts.cast(pa.int64()).to_numpy()]).astype(np.int64)

    @cached_property
    def available_from(self) -> Int64Array:
        """`[V+1]` the time (s) from which each item may be recommended; `ALWAYS` if unknown.

        This is the earlier of the recipe's time and the item's first event.
        """
        if (times := self.item_column("available_from")) is not None:
            with reading(self.path / ITEMS_FILE, self.manifest):
                times = pc.fill_null(times.cast(pa.int64()), ALWAYS)
                return np.concatenate([[ALWAYS], times.to_numpy()]).astype(np.int64)
        first = np.full(self.num_items + 1, NEVER)  # folders of older versions lack the column
        for block in self.blocks():
            np.minimum.at(first, block.item, block.timestamp)
        return np.where(first == NEVER, ALWAYS, first)

    @cached_property
    def gone(self) -> NDArray[np.bool_]:
        """`[V+1]` True for items that a grown folder keeps only to preserve ids; never candidates."""
        if (gone := self.item_column("gone")) is None:
            return np.zeros(self.num_items + 1, dtype=bool)
        return np.concatenate([[False], gone.to_numpy()]).astype(bool)

    def item_column(self, column: str) -> pa.ChunkedArray | None:
        """Read one column of `items.parquet`; None if it has no such column."""
        exists = column in column_names(self.path, ITEMS_FILE, self.manifest)
        return read_table(self.path, ITEMS_FILE, self.manifest, [column]).column(0) if exists else None

    @cached_property
    def user_ids(self) -> list[str]:
        """Raw id of each user row."""
        raw: list[str] = read_table(self.path, USERS_FILE, self.manifest, ["raw"]).column(0).to_pylist()
        return raw

    @property
    def modalities(self) -> list[str]:
        """Modalities of the feature tables."""
        return [entry.modality for entry in self.manifest.features]

    def feature(self, modality: str) -> FeatureTable:
        """The feature table of one modality."""
        if modality not in self._features:
            entries = {entry.modality: entry for entry in self.manifest.features}
            if modality not in entries:
                raise FindRecError(
                    f"{self.path} has no features of modality {modality!r}"
                    f"{suggest(modality, entries)} (available: {', '.join(entries) or 'none'})"
                )
            file, dim = self.path / entries[modality].file, entries[modality].dim
            table = FeatureTable(file, modality)
            if (len(table), table.dim) != (self.num_items + 1, dim):
                raise FindRecError(
                    f"{file} has {len(table)} rows of width {table.dim}, manifest.json says "
                    f"{self.num_items} items and width {dim}. {repair_hint(self.manifest.recipe)}"
                )
            self._features[modality] = table
        return self._features[modality]

    def histories(
        self,
        rows: Int64Array | Sequence[int],
        start: Int64Array | None = None,
        stop: Int64Array | None = None,
        *,
        tie_seed: int | None = None,
        impl: Impl = "auto",
    ) -> Histories:
        """Read the events of the users `rows` `[R]`, or only the slices `[start, stop)` of their histories.

        With `tie_seed`, training events with equal timestamps are shuffled by this seed, and slices must lie
        within the training events (the default). Such events (a basket, films rated in one burst) have no
        natural order, and a model would memorise a fixed one. The order depends only on the user and the
        seed, so slices of a user are consistent.
        """
        rows = np.asarray(rows, dtype=np.int64)
        start = np.zeros(len(rows), dtype=np.int64) if start is None else start
        if stop is None:
            stop = (self.length if tie_seed is None else self.valid_start)[rows]
        return self._packed.gather(rows, start, stop, tie_seed=tie_seed, impl=impl)

    def values(self, shard: int) -> NDArray[np.float32] | None:
        """The `value` of every event of a shard in user order; None where events have no values."""
        samples = self._packed.reader(shard).samples
        has_values = "value" in self.manifest.dtypes
        return np.concatenate([sample["value"] for sample in samples]) if has_values else None

    def blocks(self) -> Iterator[Histories]:
        """All histories in user order, a few hundred users at a time, as views of the mapped shards."""
        return self._packed.blocks()


def _user_table(path: Path, manifest: Manifest) -> UserTable:
    file, hint = path / USERS_FILE, repair_hint(manifest.recipe)
    names = ["shard", "member", "row", "length", "valid_start", "test_start"]
    with reading(file, manifest):
        table = pq.read_table(file, columns=names)
        users = UserTable(*(table[name].to_numpy().astype(np.int64) for name in names))
        problem = users.problem(manifest)
    if problem:
        raise FindRecError(f"{file} has {problem}: it does not belong to this manifest.json. {hint}")
    return users
