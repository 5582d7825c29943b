"""`findrec synthesize`: generate an event log of any size from a profile, as a data folder or a raw file.

The result depends on the profile, the numbers of users and items and the seed, not on the machine. Events are
streamed; memory grows with the items (mainly their features) and by a few numbers per user.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.csv as pa_csv
import pyarrow.parquet as pq

from findrec.datasets.folder.data_folder import DataFolder
from findrec.datasets.folder.manifest import SYNTHETIC, read_manifest
from findrec.datasets.folder.splits import Split
from findrec.datasets.folder.writer import SHARD_BYTES, Block, FolderInput, cannot_write, write_folder
from findrec.datasets.prepare.pipeline import check_replaceable
from findrec.datasets.synthetic.events import USERS_PER_BLOCK, EventMaker
from findrec.datasets.synthetic.items import Catalogue, items_table, make_catalogue, make_feature
from findrec.datasets.synthetic.profile import Profile
from findrec.errors import FindRecError
from findrec.files import replacing
from findrec.progress import progress

LOG_KINDS = (".csv", ".parquet")
LARGEST_ITEMS = 2**31 - 2  # ids are 32-bit
ROWS_PER_GROUP = 1 << 20  # of a raw log: one row group per 512 users would be too small


class Synthesis:
    """The events and items of a profile; `items` defaults to the profile's ratio to `users`."""

    def __init__(self, profile: Profile, users: int | None, items: int | None, seed: int) -> None:
        self.profile = profile
        self.users = profile.users if users is None else users
        if self.users < 1:
            raise FindRecError(f"users={self.users}: a data set needs at least one user")
        self.items = profile.items_for(self.users) if items is None else items
        if not 2 <= self.items <= LARGEST_ITEMS:
            raise FindRecError(f"items={self.items}: use from 2 to {LARGEST_ITEMS:,} items")
        if seed < 0:
            raise FindRecError(f"seed={seed}: a seed must not be negative")
        self.seed = seed
        self.sha256 = profile.sha256(self.users, self.items, seed)
        self.catalogue: Catalogue = make_catalogue(profile, self.items, seed)
        self._maker = EventMaker(profile, self.catalogue, self.users, seed)

    def blocks(self) -> Iterator[Block]:
        """All histories, 512 users at a time, with progress."""
        with progress("make histories", total=self.users, unit="users") as bar:
            for index in range(self._maker.num_blocks):
                block = self._maker.block(index)
                yield block
                bar.advance(len(block.length))


def synthesize(
    path: Path,
    profile: Profile,
    *,
    users: int | None = None,
    items: int | None = None,
    seed: int = 0,
    force: bool = False,
    shard_bytes: int = SHARD_BYTES,
) -> DataFolder:
    """Write a data folder from `profile`, or open it if it already exists with the same parameters.

    `users` and `items` are sizes (default: the profile's own; items in proportion to the users). The split is
    leave-one-out, by timestamp where a session has a single one (a basket). With `force` another data folder
    is replaced; a folder with other files is never touched.
    """
    path = Path(path)
    made = Synthesis(profile, users, items, seed)
    check_replaceable(path)
    if not force and path.is_dir() and any(path.iterdir()):
        if read_manifest(path).recipe_sha256 == made.sha256:
            return DataFolder.open(path)
        raise FindRecError(
            f"{path} holds other data or options. Replace it with --force, or choose another folder"
        )
    contents = FolderInput(
        recipe=SYNTHETIC + profile.name,
        recipe_sha256=made.sha256,
        split=Split(unit="event" if profile.sessions.within_seconds else "timestamp"),
        users=pa.array(np.arange(1, made.users + 1)).cast(pa.string()),
        items=items_table(made.catalogue),
        blocks=made.blocks(),
        features=[
            make_feature(made.catalogue, name, modality, seed) for name, modality in profile.features.items()
        ],
    )
    write_folder(path, contents, shard_bytes=shard_bytes)
    return DataFolder.open(path, verify=False)  # it was hashed while it was written


def write_log(
    path: Path, profile: Profile, *, users: int | None = None, items: int | None = None, seed: int = 0
) -> int:
    """Write the same events as a raw log (user, item, timestamp in seconds) and return their number.

    `path` ends with .csv or .parquet; an existing file is replaced once the new one is complete.
    """
    path = Path(path)
    if path.suffix not in LOG_KINDS:
        raise FindRecError(f"{path}: a raw log ends with {' or '.join(LOG_KINDS)}")
    made = Synthesis(profile, users, items, seed)
    schema = pa.schema([("user", pa.int64()), ("item", pa.int64()), ("timestamp", pa.int64())])
    num_events = 0
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        kind = pa_csv.CSVWriter if path.suffix == ".csv" else pq.ParquetWriter
        with replacing(path) as part, kind(str(part), schema) as writer:
            for table in _log_tables(made, schema):
                writer.write_table(table)
                num_events += table.num_rows
    except OSError as error:
        raise cannot_write(path, error) from error
    return num_events


def _log_tables(made: Synthesis, schema: pa.Schema) -> Iterator[pa.Table]:
    """The events as rows, about `ROWS_PER_GROUP` at a time."""
    pending: list[pa.Table] = []
    for index, block in enumerate(made.blocks()):
        rows = index * USERS_PER_BLOCK + np.arange(1, len(block.length) + 1)
        columns = [np.repeat(rows, block.length), block.columns["item"], block.columns["timestamp"]]
        pending.append(pa.table([pa.array(column) for column in columns], schema=schema))
        if sum(table.num_rows for table in pending) >= ROWS_PER_GROUP:
            yield pa.concat_tables(pending).combine_chunks()
            pending = []
    if pending:
        yield pa.concat_tables(pending).combine_chunks()
