"""The webdataset pipeline gives each user once, with the arrays that the compiled reader gives."""

from __future__ import annotations

import pickle
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
import torch
import webdataset
from torch.utils.data import DataLoader

from findrec.datasets import as_webdataset
from findrec.datasets.folder.data_folder import DataFolder
from findrec.datasets.folder.splits import Split
from findrec.datasets.folder.writer import Block, FolderInput, write_folder
from findrec.errors import FindRecError

USERS, ITEMS = 70, 30


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> DataFolder:
    """Several shards and members, with types and values of events; some users lack training events."""
    rng = np.random.default_rng(0)
    blocks = []
    for _ in range(USERS // 5):
        length = rng.integers(1, 40, 5)
        count = int(length.sum())
        time = np.concatenate([np.sort(rng.integers(0, 1000, n)) for n in length])
        columns = {"item": rng.integers(1, ITEMS + 1, count), "timestamp": time}
        columns |= {"event": rng.integers(0, 2, count), "value": rng.random(count)}
        blocks.append(Block(columns, length))
    names = pa.array([f"item {v}" for v in range(ITEMS)])
    nothing = pa.nulls(ITEMS, pa.string())
    path = tmp_path_factory.mktemp("folder") / "data"
    given = FolderInput(
        recipe="made",
        recipe_sha256="0" * 64,
        split=Split(kind="global_temporal", valid_from=500, test_from=800),
        users=pa.array([f"u{n}" for n in range(USERS)]),
        items=pa.table({"raw": names, "title": names, "text": nothing, "category": nothing}),
        blocks=blocks,
        event_types=["buy", "view"],
    )
    write_folder(path, given, shard_bytes=15_000)
    opened = DataFolder.open(path)
    assert len(opened.manifest.shards) > 3
    assert (opened.valid_start == 0).any()
    return opened


def same_as_compiled(folder: DataFolder, samples: list[dict[str, Any]], end: Any) -> None:
    for sample in samples:
        user = sample["user"]
        read = folder.histories([user], None, end[[user]])
        assert sample["__key__"] == folder.user_ids[user]
        for name in ("item", "timestamp", "event"):
            assert np.array_equal(sample[name], getattr(read, name))
        assert len(sample["value"]) == len(sample["item"])
        assert (sample["valid_start"], sample["test_start"]) == (
            folder.valid_start[user],
            folder.test_start[user],
        )


def test_every_user_comes_once_and_whole(folder: DataFolder) -> None:
    samples = list(as_webdataset(folder.path))
    assert [sample["user"] for sample in samples] == list(range(USERS))
    same_as_compiled(folder, samples, folder.length)
    urls = [str(folder.path / shard.name) for shard in folder.manifest.shards]
    stored = [packed["value.npy"] for packed in webdataset.WebDataset(urls, shardshuffle=False).decode()]
    assert np.array_equal(np.concatenate([s["value"] for s in samples]), np.concatenate(stored))


@pytest.mark.parametrize("split", ["train", "valid", "test"])
def test_parts_end_where_they_end(folder: DataFolder, split: Any) -> None:
    begin = {"train": 0 * folder.length, "valid": folder.valid_start, "test": folder.test_start}[split]
    end = {"train": folder.valid_start, "valid": folder.test_start, "test": folder.length}[split]
    samples = list(as_webdataset(folder, split=split))
    assert [sample["user"] for sample in samples] == np.flatnonzero(begin < end).tolist()
    assert 0 < len(samples) < USERS
    same_as_compiled(folder, samples, end)


@pytest.mark.parametrize("workers", [0, 2])
def test_workers_of_a_loader_share_the_users(folder: DataFolder, workers: int) -> None:
    pipeline = as_webdataset(folder, split="test", shardshuffle=10).shuffle(20).map(dict)
    loader = DataLoader(pipeline, batch_size=None, num_workers=workers)
    samples = [{k: v.numpy() if torch.is_tensor(v) else v for k, v in s.items()} for s in loader]
    users = [sample["user"] for sample in samples]
    assert users != sorted(users)
    assert sorted(users) == np.flatnonzero(folder.test_start < folder.length).tolist()
    same_as_compiled(folder, samples, folder.length)


def test_workers_that_are_spawned_can_take_it(folder: DataFolder) -> None:
    again = pickle.loads(pickle.dumps(as_webdataset(folder)))
    assert len(list(again)) == USERS


def test_what_is_wrong_is_said_at_once(folder: DataFolder, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="split must be 'train'"):
        as_webdataset(folder, split="training")  # type: ignore[arg-type]
    with pytest.raises(FindRecError, match="no data folder"):
        as_webdataset(tmp_path / "absent")
    with pytest.raises(FindRecError, match="never run"):
        as_webdataset("pipe:cat data")


def test_the_import_stays_light() -> None:
    code = "import sys, findrec.datasets; print({'torch', 'webdataset', 'numpy'} & set(sys.modules))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == "set()\n"
