"""The prepared data folder, opened for reading: per-user cuts in memory, histories and features on demand."""

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

from findrec.datasets._native import Impl
from findrec.datasets.features import FeatureTable
from findrec.datasets.histories import Histories
from findrec.datasets.manifest import MANIFEST_NAME, Manifest, how_to_mend, read_manifest, sha256_file
from findrec.datasets.packed import PackedHistories, UserTable
from findrec.datasets.remote import RemoteFolder, is_remote
from findrec.datasets.splits import Int64Array
from findrec.errors import FindRecError, suggest

_PART = r"[A-Za-z0-9_][^/\\:\0]*"
_NAME = re.compile(rf"{_PART}(/{_PART})*")  # no absolute paths, no `..`, no drives and no addresses
ALWAYS, NEVER = np.iinfo(np.int64).min, np.iinfo(np.int64).max  # times before and after all others


def _check_names(place: str, manifest: Manifest) -> None:
    names = [shard.name for shard in manifest.shards]
    names += [*manifest.files, *(entry.file for entry in manifest.features)]
    for name in names:
        if _NAME.fullmatch(name) is None:
            raise FindRecError(
                f"{place}/{MANIFEST_NAME} names a file outside the folder: {name!r}. "
                f"{how_to_mend(manifest.recipe)}"
            )


def _check_files(path: Path, manifest: Manifest, verify: bool) -> None:
    """Every file of the manifest is there with the right size and, with `verify`, the right sha256."""
    mend = how_to_mend(manifest.recipe)
    expected = {shard.name: (shard.sha256, shard.bytes) for shard in manifest.shards}
    expected |= {name: (digest, -1) for name, digest in manifest.files.items()}
    for name, (digest, size) in expected.items():
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

    def __init__(
        self,
        path: Path,
        manifest: Manifest,
        *,
        remote: RemoteFolder | None = None,
    ) -> None:
        self.path = path  # where everything but the shards lies
        self.location = str(path) if remote is None else remote.url  # what `open` takes, elsewhere too
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
    def open(place: Path | str, *, verify: bool = True, cache_bytes: int | None = None) -> DataFolder:
        """Open a folder made by `prepare` or `write_data_folder`, here or at an address (http(s), s3, gs).

        `verify` hashes every file (about 1 GB/s); without it only presence and sizes are checked, which is
        enough where another process of the same run has verified already. The shards of an address are
        fetched when they are needed, each verified then, into a cache of about `cache_bytes` (default:
        `FINDREC_CACHE_BYTES`, else 64 GiB). `FindRecError` names the file that is missing or altered.
        """
        if is_remote(place):
            remote = RemoteFolder(str(place), cache_bytes)
            _check_names(remote.url, remote.manifest)
            remote.fetch_tables(verify=verify)
            return DataFolder(remote.path, remote.manifest, remote=remote)
        path = Path(place)
        manifest = read_manifest(path)
        _check_names(str(path), manifest)
        _check_files(path, manifest, verify)
        return DataFolder(path, manifest)

    @property
    def remote(self) -> bool:
        """Whether the shards come from an address."""
        return self._remote is not None

    def read_ahead(self, users: Int64Array) -> None:
        """Users whose histories will be asked for, soonest first: their shards are fetched meanwhile."""
        if self._remote is not None:
            shards, first = np.unique(self._packed.shards_of(users), return_index=True)
            self._remote.ahead(shards[np.argsort(first)].tolist())

    def num_shards_of(self, users: Int64Array) -> int:
        """How many shards hold the histories of these users."""
        return len(np.unique(self._packed.shards_of(users)))

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
            file = self.path / files[modality]
            table = FeatureTable(file, modality)
            dim = next(entry.dim for entry in self.manifest.features if entry.modality == modality)
            if (len(table), table.dim) != (self.num_items + 1, dim):
                raise FindRecError(
                    f"{file} has {len(table)} rows of width {table.dim}, manifest.json says "
                    f"{self.num_items} items and width {dim}. {how_to_mend(self.manifest.recipe)}"
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
        """Events of the users `rows` `[R]`, or of each only the events `[start, stop)`.

        With `tie_seed` training events of one timestamp are in an order drawn anew for each seed; slices then
        end with the training events at the latest (and does by default). Events of one instant have no
        order of their own (films rated in one burst, a basket): a fixed one is learnt by heart. The order
        depends on the user and the seed alone, so slices of a user agree.
        """
        rows = np.asarray(rows, dtype=np.int64)
        start = np.zeros(len(rows), dtype=np.int64) if start is None else start
        if stop is None:
            stop = (self.length if tie_seed is None else self.valid_start)[rows]
        return self._packed.gather(rows, start, stop, tie_seed=tie_seed, impl=impl)

    def blocks(self) -> Iterator[Histories]:
        """All histories in user order, as they are packed: at most a few hundred users at a time.

        The arrays are views of the mapped shards: one pass over any folder takes little memory.
        """
        return self._packed.blocks()


def _user_table(path: Path, manifest: Manifest) -> UserTable:
    file, mend = path / "users.parquet", how_to_mend(manifest.recipe)
    names = ["shard", "member", "row", "length", "valid_start", "test_start"]
    try:
        table = pq.read_table(file, columns=names)
        users = UserTable(*(table[name].to_numpy().astype(np.int64) for name in names))
    except (pa.ArrowException, OSError, KeyError, ValueError) as error:
        raise FindRecError(f"{file} cannot be read ({str(error).splitlines()[0]}). {mend}") from None
    if problem := users.problem(manifest):
        raise FindRecError(f"{file} holds {problem}: it does not belong to this manifest.json. {mend}")
    return users
