"""Tars as webdataset's own writers make them become events; a bad one is named and stops the work."""

from __future__ import annotations

import gzip
import io
import json
import pickle
import tarfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import duckdb
import numpy as np
import pyarrow as pa
import pytest
import webdataset

from findrec.datasets.prepare.pipeline import prepare
from findrec.datasets.sources import webdataset_format
from findrec.datasets.sources.formats import SourceTables
from findrec.datasets.sources.recipe import SourceFile, parse_recipe
from findrec.errors import FindRecError

Sample = dict[str, Any]
EVENTS = {"ann": ([3, 1, 3], [10, 20, 30]), "bob": ([2, 3], [15, 16])}
ROWS = [(user, item, time) for user, both in EVENTS.items() for item, time in zip(*both, strict=True)]
OBJECTS = {user: {"item": items, "timestamp": times} for user, (items, times) in EVENTS.items()}


def pack(path: Path, samples: Sequence[Sample]) -> Path:
    with webdataset.TarWriter(str(path)) as tar:
        for sample in samples:
            tar.write(sample)
    return path


def read(paths: Sequence[Path], what: str = "*", **keys: Any) -> list[tuple[Any, ...]]:
    db = duckdb.connect()
    tables = SourceTables(db, paths[0].parent, "mine", 0.0)
    file = SourceFile.model_validate({"format": "webdataset", **keys})
    tables.declare("log", file, list(paths))
    return db.execute(tables.fill(f"SELECT {what} FROM {{log}}")).fetchall()


def arrays(user: str, dtype: str = "i8") -> Sample:
    return {"item.npy": np.array(EVENTS[user][0], dtype), "timestamp.npy": np.array(EVENTS[user][1])}


WAYS: dict[str, Callable[[str], Sample]] = {
    "json": lambda user: {"json": OBJECTS[user]},
    "msgpack": lambda user: {"msgpack": OBJECTS[user]},
    "npz": lambda user: {"npz": {name: np.array(v) for name, v in OBJECTS[user].items()}},
    "npy": arrays,
    "small npy": lambda user: arrays(user, "u1"),
    "big-endian npy": lambda user: arrays(user, ">i4"),
    "json of each": lambda user: {f"{name}.json": v for name, v in OBJECTS[user].items()},
    "mixed, with what is not read": lambda user: {
        "item.mp": EVENTS[user][0],
        "timestamp.npy": np.array(EVENTS[user][1]),
        "jpg": b"\xff\xd8",
        "cls": 3,
    },
}


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("suffix", [".tar", ".tar.gz", ".tgz"])
def test_members_of_each_kind_give_the_same_rows(tmp_path: Path, way: str, suffix: str) -> None:
    path = pack(tmp_path / f"users{suffix}", [{"__key__": user, **WAYS[way](user)} for user in EVENTS])
    assert read([path], "__key__, item, timestamp") == ROWS
    assert [item for item in tmp_path.iterdir() if item != path] == []


def test_zstd(tmp_path: Path) -> None:
    path = pack(tmp_path / "users.tar", [{"__key__": user, **arrays(user)} for user in EVENTS])
    packed = tmp_path / "users.tar.zst"
    with pa.CompressedOutputStream(pa.OSFile(str(packed), "wb"), "zstd") as stream:
        stream.write(path.read_bytes())
    assert read([packed], "__key__, item, timestamp") == ROWS


def test_prepare_reads_the_shards_of_a_glob(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(webdataset_format, "_SAMPLES_AT_ONCE", 3)
    with webdataset.ShardWriter(str(tmp_path / "users-%02d.tar"), maxcount=4, verbose=0) as shards:
        for n in range(10):
            events = {"sku": [f"s{n % 3}", "s7"], "at": [100 + n, 200 + n], "stars": [n, 0.5]}
            shards.write({"__key__": f"{n:06d}", "log.json": events, "who.json": json.dumps(f"u{n}")})
    place = {"path": ".", "files": {"shards": {"member": "users-*.tar", "format": "webdataset"}}}
    tree = {
        "name": "tars",
        "title": "t",
        "licence": "l",
        "source": "s",
        "sources": {"disk": [place]},
        "events": 'SELECT who AS "user", "log.sku" AS item, "log.at" AS timestamp, "log.stars" AS value '
        "FROM {shards}",
    }
    made = prepare(parse_recipe(tree, "tars", tmp_path), tmp_path / "data")
    assert (made.num_users, made.num_items, made.manifest.num_events) == (10, 4, 20)
    assert made.user_ids == [f"u{n}" for n in range(10)]
    assert made.histories([4]).timestamp.tolist() == [104, 204]
    values = made.values(0)
    assert values is not None
    assert values.tolist() == [value for n in range(10) for value in (n, 0.5)]  # numbers of both kinds meet


def test_columns_pick_fields_and_their_types(tmp_path: Path) -> None:
    samples = [
        {"__key__": "0", "json": {"user": 5, "item": [1, 2], "tags": ["a"], "t": ["3", "4"]}},
        {"__key__": "1", "json": {"user": 6, "item": [1.0], "t": ["5"], "more": 1}},
    ]
    path = pack(tmp_path / "users.tar", samples)
    columns = {"user": "VARCHAR", "t": "BIGINT", "item": "BIGINT"}
    assert read([path], columns=columns) == [("5", 3, 1), ("5", 4, 2), ("6", 5, 1)]
    with pytest.raises(FindRecError, match=r"users\.tar\) cannot be read as webdataset: Conversion Error"):
        read([path], columns={"item": "BIGINT", "t": "DATE"})


def test_keys_that_repeat_name_no_user(tmp_path: Path) -> None:
    paths = [
        pack(tmp_path / f"{n}.tar", [{"__key__": "000000", "json": {"user": n, "item": [n]}}]) for n in (1, 2)
    ]
    with pytest.raises(FindRecError, match=r"several samples have the key '000000' \(1\.tar, 2\.tar\)"):
        read(paths)
    assert read(paths, columns={"user": "BIGINT", "item": "BIGINT"}) == [(1, 1), (2, 2)]


def npy(values: Any) -> bytes:
    buffer = io.BytesIO()
    np.save(buffer, values, allow_pickle=True)
    return buffer.getvalue()


def npz(**values: Any) -> bytes:
    buffer = io.BytesIO()
    np.savez_compressed(buffer, **values)
    return buffer.getvalue()


@pytest.mark.parametrize(
    ("members", "why"),
    [
        ({"json": {"item": [1, 2], "timestamp": [1]}}, "'item' has 2, 'timestamp' has 1; correct them"),
        ({"json": {"item": 1, "timestamp": 2}}, "but it has no list"),
        (
            {"json": {"item": [1]}},
            "'item' instead of '__key__', 'item', 'timestamp': all samples need the same",
        ),
        (
            {"json": {"item": [1], "timestamp": [1], "more": 1}},
            "'more' instead of '__key__', 'item', 'timestamp'",
        ),
        ({"json": {"item": ["1"], "timestamp": [1]}}, "'item' holds string, but numbers in sample 'good'"),
        ({"json": {"item": [1, "a"], "timestamp": [1, 2]}}, "onver"),
        ({"json": {"item": [[1]], "timestamp": [1]}}, "'item' holds list<.*or select other fields"),
        ({"json": {"item": [2**70], "timestamp": [1]}}, "too (large|big)"),
        ({"json": b"{"}, "Expecting property name"),
        ({"json": b"\xff\xfe{"}, "codec can't decode|Expecting"),
        ({"json": b"[" * 100_000}, "recursion"),
        (
            {"json": {"item": [1], "timestamp": [1]}, "item.npy": np.ones(1)},
            "two members have the field 'item'",
        ),
        ({"json": [1, 2]}, "an array without a name: name it KEY.item.npy"),
        ({"item.npy": np.ones((2, 2)), "timestamp.npy": np.ones(2)}, "'item' has 2 dimensions"),
        ({"item.npy": npy(np.array([{}, 1], object)), "timestamp.npy": np.ones(2)}, "[Oo]bject arrays"),
        ({"item.npy": pickle.dumps([1]), "timestamp.npy": np.ones(1)}, "magic string"),
        ({"item.npy": npy(np.ones(9))[:-8], "timestamp.npy": np.ones(9)}, "EOF|expected"),
        ({"npz": npz(item=np.array([{}], object), timestamp=np.ones(1))}, "[Oo]bject arrays"),
        ({"npz": b"PK no zip"}, "not a zip file"),
        ({"npz": npz(item=np.zeros(1 << 17), timestamp=np.ones(1))}, "unpacks to .* bytes, more than"),
        ({"msgpack": b"\xc1"}, "FormatError|invalid"),
        ({"msgpack": {"item": [1], "timestamp": [b"x"]}}, "'timestamp' holds binary"),
    ],
)
def test_bad_samples_are_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, members: Sample, why: str
) -> None:
    monkeypatch.setattr(webdataset_format, "_LARGEST_MEMBER", 1 << 19)
    good = {"__key__": "good", "json": {"item": [1], "timestamp": [1]}}
    path = pack(tmp_path / "users.tar", [good, {"__key__": "bad", **members}])
    with pytest.raises(
        FindRecError, match=rf"recipe mine: sample 'bad' of .*users\.tar cannot be read: .*{why}"
    ):
        read([path])


def member(name: str, data: bytes = b"", **keys: Any) -> tuple[tarfile.TarInfo, io.BytesIO]:
    info = tarfile.TarInfo(name)
    info.size = len(data)
    for key, value in keys.items():
        setattr(info, key, value)
    return info, io.BytesIO(data)


@pytest.mark.parametrize(
    ("bad", "why"),
    [
        (member("u.pkl", pickle.dumps([1])), "is a pickle, which can run code"),
        (member("u.item.PTH", b"x"), "is a pickle"),
        (member("/etc/u.json", b"{}"), "has an absolute name or one with"),
        (member("a/../../u.json", b"{}"), "has an absolute name or one with"),
        (member("u.json", type=tarfile.SYMTYPE, linkname="/etc/passwd"), "is a link or special file"),
        (member("u.json", type=tarfile.LNKTYPE, linkname="good.json"), "is a link or special file"),
        (member("u.json", type=tarfile.FIFOTYPE), "is a link or special file"),
        (member("u.json", b" " * 9_000), "has 9,000 bytes, more than 8,192: split the user"),
        (member("good.json", b"{}"), "duplicate file name"),
    ],
)
def test_unsafe_members_are_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, bad: tuple[tarfile.TarInfo, io.BytesIO], why: str
) -> None:
    monkeypatch.setattr(webdataset_format, "_LARGEST_MEMBER", 1 << 13)
    path = tmp_path / "users.tar"
    with tarfile.open(path, "w") as tar:
        tar.addfile(*member("good.json", json.dumps(OBJECTS["ann"]).encode()))
        bad[1].seek(0)
        tar.addfile(*bad)
    with pytest.raises(FindRecError, match=rf"recipe mine: .*users\.tar cannot be read: .*{why}"):
        read([path])


def test_folders_and_hidden_files_are_no_samples(tmp_path: Path) -> None:
    path = tmp_path / "users.tar"
    with tarfile.open(path, "w") as tar:
        tar.addfile(*member("./a", type=tarfile.DIRTYPE))
        tar.addfile(*member("./a/.ann.json", b"no json"))
        tar.addfile(*member("./a/__meta__.json", b"{}"))
        tar.addfile(*member("./a/ann.json", json.dumps(OBJECTS["ann"]).encode()))
    assert read([path], "item") == [(3,), (1,), (3,)]
    with tarfile.open(path, "w") as tar:
        tar.addfile(*member("README", b"nothing"))
    with pytest.raises(FindRecError, match=r"has no samples: a sample has members KEY\.FIELD\.EXTENSION"):
        read([path])


@pytest.mark.parametrize("gz", [False, True])
@pytest.mark.parametrize("cut", [100, 1024, 2048, 2048 + 100, 4096, 4096 + 700])
def test_tars_that_are_cut_short_are_refused(tmp_path: Path, cut: int, gz: bool) -> None:
    whole = pack(
        tmp_path / "users.tar", [{"__key__": user, "json": OBJECTS[user]} for user in ["ann", "bob"]]
    )
    data = whole.read_bytes()[:cut]
    path = tmp_path / ("cut.tar.gz" if gz else "cut.tar")
    path.write_bytes(gzip.compress(data) if gz else data)
    if cut == 4096 + 700:  # behind the first of the blocks that end a tar: everything is there
        assert len(read([path])) == len(ROWS)
        return
    with pytest.raises(FindRecError, match=r"cut\.tar.* is not a readable tar.*Download it again"):
        read([path])


def test_damaged_archives_are_refused(tmp_path: Path) -> None:
    path = pack(tmp_path / "users.tar", [{"__key__": user, "json": OBJECTS[user]} for user in EVENTS])
    data = bytearray(path.read_bytes())
    for place in (3, 2048 + 3):  # names of the first and of the second member
        damaged = bytearray(data)
        damaged[place] ^= 1
        path.write_bytes(damaged)
        with pytest.raises(FindRecError, match="is not a readable tar"):
            read([path])
    packed = tmp_path / "users.tar.gz"
    packed.write_bytes(gzip.compress(bytes(data))[:-20])
    with pytest.raises(FindRecError, match=r"users\.tar\.gz.*is not a readable tar"):
        read([packed])
