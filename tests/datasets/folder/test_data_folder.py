"""Data folders: written data are read back, and altered files are rejected."""

from __future__ import annotations

import io
import itertools
import tarfile
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
import webdataset

from findrec.datasets.folder.data_folder import DataFolder
from findrec.datasets.folder.in_memory import write_data_folder
from findrec.datasets.folder.shards import ShardReader
from findrec.datasets.folder.writer import staged
from findrec.errors import FindRecError


def histories(users: int = 25) -> list[list[int]]:
    rng = np.random.default_rng(0)
    return [rng.integers(1, 30, rng.integers(1, 20)).tolist() for _ in range(users)]


@pytest.fixture
def folder(tmp_path: Path) -> DataFolder:
    return write_data_folder(
        tmp_path / "data", histories(), num_items=30, users_per_member=4, shard_bytes=15_000
    )


def test_histories_are_read_back_in_any_order(folder: DataFolder) -> None:
    given = histories()
    assert len(folder.manifest.shards) > 1
    rows = np.random.default_rng(1).permutation(25)
    read = folder.histories(rows)
    for r, user in enumerate(rows):
        assert read.item[read.offset[r] : read.offset[r + 1]].tolist() == given[user]
    assert folder.length.tolist() == [len(h) for h in given]


def test_slices_and_their_bounds(folder: DataFolder) -> None:
    user = int(folder.length.argmax())
    read = folder.histories([user], np.array([2]), np.array([5]))
    assert read.item.tolist() == histories()[user][2:5]
    with pytest.raises(IndexError):
        folder.histories([user], np.array([0]), folder.length[[user]] + 1)


def test_stock_webdataset_reads_the_shards(folder: DataFolder) -> None:
    urls = [str(folder.path / shard.name) for shard in folder.manifest.shards]
    read: list[list[int]] = []
    for sample in webdataset.WebDataset(urls, shardshuffle=False).decode():
        offset = sample["offset.npy"]
        assert len(sample["timestamp.npy"]) == offset[-1]
        read += [sample["item.npy"][a:b].tolist() for a, b in itertools.pairwise(offset)]
    assert read == histories()


@pytest.mark.parametrize("name", ["shards/events-00001.tar", "items.parquet", "users.parquet"])
def test_altered_and_missing_files_are_named(folder: DataFolder, name: str) -> None:
    file = folder.path / name
    data = bytearray(file.read_bytes())
    data[len(data) // 2] ^= 1
    file.write_bytes(data)
    with pytest.raises(FindRecError, match=rf"{name} was altered.*prepare data --force"):
        DataFolder.open(folder.path)
    file.unlink()
    with pytest.raises(FindRecError, match=f"{name} is missing"):
        DataFolder.open(folder.path, verify=False)


def test_truncated_shard_is_detected_without_hashing(folder: DataFolder) -> None:
    file = folder.path / "shards/events-00000.tar"
    file.write_bytes(file.read_bytes()[:-512])
    with pytest.raises(FindRecError, match="bytes"):
        DataFolder.open(folder.path, verify=False)


def test_bad_manifests(folder: DataFolder) -> None:
    manifest = folder.path / "manifest.json"
    good = manifest.read_text()
    manifest.write_text(good[: len(good) // 2])
    with pytest.raises(FindRecError, match="damaged"):
        DataFolder.open(folder.path)
    manifest.write_text(good.replace('"schema_version": 1', '"schema_version": 99'))
    with pytest.raises(FindRecError, match="version 99"):
        DataFolder.open(folder.path)
    manifest.write_text(good.replace('"users.parquet"', '"../users.parquet"'))
    with pytest.raises(FindRecError, match="outside the folder"):
        DataFolder.open(folder.path)
    manifest.unlink()
    with pytest.raises(FindRecError, match="is incomplete"):
        DataFolder.open(folder.path)


def _link(tar: tarfile.TarFile) -> None:
    info = tarfile.TarInfo("000000.item.npy")
    info.type, info.linkname = tarfile.SYMTYPE, "/etc/passwd"
    tar.addfile(info)


def _member(name: str, data: bytes) -> Callable[[tarfile.TarFile], None]:
    def add(tar: tarfile.TarFile) -> None:
        info = tarfile.TarInfo(name)
        info.size = len(data)
        tar.addfile(info, io.BytesIO(data))

    return add


def _pickled() -> bytes:
    buffer = io.BytesIO()
    np.save(buffer, np.array([{"a": 1}], dtype=object), allow_pickle=True)
    return buffer.getvalue()


@pytest.mark.parametrize(
    "add",
    [
        _link,
        _member("../000000.item.npy", b"x"),
        _member("/tmp/000000.item.npy", b"x"),
        _member("000000.item.pickle", b"x"),
        _member("000000.item.npy", b"no array"),
        _member("000000.item.npy", _pickled()),
    ],
)
def test_unsafe_members_are_rejected(tmp_path: Path, add: Callable[[tarfile.TarFile], None]) -> None:
    with tarfile.open(tmp_path / "bad.tar", "w", format=tarfile.USTAR_FORMAT) as tar:
        add(tar)
    with pytest.raises(FindRecError, match="cannot be read"):
        ShardReader(tmp_path / "bad.tar")


def test_features_by_item_id(tmp_path: Path) -> None:
    values = np.arange(12, dtype=np.float32).reshape(4, 3)
    values[2] = np.nan
    folder = write_data_folder(tmp_path / "data", [[1, 2, 3, 4]], features={"image": values})
    assert folder.modalities == ["image"]
    rows = folder.feature("image").rows(torch.tensor([0, 3, 4, 1]))
    assert rows.present.tolist() == [False, False, True, True]
    assert rows.values.tolist() == [[0, 0, 0], [0, 0, 0], [9, 10, 11], [0, 1, 2]]
    assert folder.feature("image").dim == 3
    assert folder.manifest.features[0].missing == 1
    with pytest.raises(FindRecError, match="'image'"):
        folder.feature("imag")


def test_features_of_a_wrong_shape_or_size(tmp_path: Path) -> None:
    with pytest.raises(FindRecError, match="shape"):
        write_data_folder(tmp_path / "data", [[1, 2]], features={"text": np.zeros((5, 2))})
    with pytest.raises(FindRecError, match="fp16"):
        write_data_folder(tmp_path / "data", [[1, 2]], features={"text": np.full((2, 2), 1e6)})
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("given", "times", "message"),
    [([[1, 2], []], None, "at least one"), ([[1, 0]], None, "1..1"), ([[1, 2]], [[5, 4]], "decrease")],
)
def test_invalid_input_leaves_no_folder(
    tmp_path: Path, given: list[list[int]], times: list[list[int]] | None, message: str
) -> None:
    with pytest.raises(FindRecError, match=message):
        write_data_folder(tmp_path / "data", given, times)
    assert list(tmp_path.iterdir()) == []


def test_a_failed_write_keeps_the_old_folder(folder: DataFolder) -> None:
    def stop() -> Iterator[None]:
        with staged(folder.path) as staging:
            (staging / "half").write_text("")
            yield
            raise OSError(28, "No space left on device")

    with pytest.raises(FindRecError, match="No space left"):
        list(stop())
    assert DataFolder.open(folder.path).num_users == 25
    assert [p.name for p in folder.path.parent.iterdir()] == ["data"]


def test_hash_does_not_depend_on_shard_boundaries(tmp_path: Path) -> None:
    one = write_data_folder(tmp_path / "one", histories(), users_per_member=3)
    two = write_data_folder(tmp_path / "two", histories(), users_per_member=7, shard_bytes=1000)
    assert one.manifest.events_sha256 == two.manifest.events_sha256
    changed = histories()
    changed[4][0] = changed[4][0] % 29 + 1
    three = write_data_folder(tmp_path / "three", changed)
    assert three.manifest.events_sha256 != one.manifest.events_sha256
