"""A pipeline of the `webdataset` library over a prepared data folder, for training outside FindRec."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

if TYPE_CHECKING:  # `import findrec.datasets` loads neither torch nor webdataset
    from findrec.datasets.folder.data_folder import DataFolder

_USERS_AT_ONCE = 512

UpTo = Literal["train", "valid", "test"]


@dataclass(frozen=True)
class _Users:
    """Pipeline stage from shards to users; each process opens the folder itself."""

    location: str
    split: UpTo | None

    def __call__(self, shards: Iterable[dict[str, Any]]) -> Iterator[dict[str, Any]]:
        import numpy as np

        from findrec.datasets.folder.data_folder import DataFolder
        from findrec.datasets.folder.tables import USERS_FILE, read_table

        folder = DataFolder.open(self.location, verify=False)
        raw_ids = read_table(folder.path, USERS_FILE, folder.manifest, ["raw"]).column(0)
        numbers = {url: number for number, url in enumerate(_urls(folder))}
        begin, end = {
            None: (np.zeros_like(folder.length), folder.length),
            "train": (np.zeros_like(folder.length), folder.valid_start),
            "valid": (folder.valid_start, folder.test_start),
            "test": (folder.test_start, folder.length),
        }[self.split]
        for shard in shards:
            entry = folder.manifest.shards[numbers[shard["url"]]]
            value = folder.values(numbers[shard["url"]])
            all_users = np.arange(entry.first_user, entry.first_user + entry.users)
            first = np.cumsum(folder.length[all_users]) - folder.length[all_users]  # event in `value`
            for start in range(0, entry.users, _USERS_AT_ONCE):
                users = all_users[start : start + _USERS_AT_ONCE]
                read = folder.histories(users, None, end[users])
                columns = {"item": read.item, "timestamp": read.timestamp, "event": read.event}
                keys = raw_ids.slice(users[0], len(users)).to_pylist()
                for r, (user, key) in enumerate(zip(users.tolist(), keys, strict=True)):
                    if begin[user] == end[user]:
                        continue
                    events = slice(read.offset[r], read.offset[r + 1])
                    sample = {"__key__": key, "__url__": shard["url"], "user": user}
                    # Copies: a view would be sent to another process with its whole block.
                    sample |= {k: v[events].copy() for k, v in columns.items() if v is not None}
                    if value is not None:
                        sample["value"] = value[first[start + r] :][: end[user]].copy()
                    cuts = {"valid_start": folder.valid_start, "test_start": folder.test_start}
                    yield sample | {name: int(cut[user]) for name, cut in cuts.items()}


def _urls(folder: DataFolder) -> list[str]:
    return [f"{folder.location}/{shard.name}" for shard in folder.manifest.shards]


def as_webdataset(
    folder: DataFolder | Path | str, *, split: UpTo | None = None, shardshuffle: int = 0
) -> Any:
    """A `webdataset` pipeline over a data folder, with one sample per user.

    A sample has `__key__` (the raw user id), `user` (its row), the arrays `item`, `timestamp` and, where the
    folder has them, `event` and `value`, oldest event first, and the cuts of the split: `[0, valid_start)`
    are training events, `[valid_start, test_start)` validation targets, the rest test targets.

    Args:
        folder: A prepared data folder, its path or its URL.
        split: Cut the histories after the events of this part, and skip users without any in it.
            Default: the whole histories of all users.
        shardshuffle: The buffer size of shuffling shards, as in `webdataset.WebDataset`.

    Returns:
        A pipeline with webdataset's methods (`.shuffle(1000).map(f).batched(32)`), for a `DataLoader` with
        any number of workers. Shards are divided over processes of torch.distributed and over workers, so
        more workers than shards are idle.
    """
    import webdataset

    from findrec.datasets.folder.data_folder import DataFolder

    if split not in (None, "train", "valid", "test"):
        raise ValueError(f"split must be 'train', 'valid', 'test' or None, not {split!r}")
    opened = folder if isinstance(folder, DataFolder) else DataFolder.open(folder)
    shards = webdataset.FluidWrapper(webdataset.SimpleShardList(_urls(opened)))
    shards = shards.compose(webdataset.split_by_node, webdataset.split_by_worker)
    return shards.shuffle(shardshuffle).compose(_Users(opened.location, split))
