"""Invalid data folders are rejected even if all hashes match, as in folders of other or faulty programs.

Folders with wrong hashes are tested in test_data_folder.py.
"""

from __future__ import annotations

import io
import json
import tarfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from safetensors.numpy import load_file, save_file
from typer.testing import CliRunner

from findrec.cli.app import app
from findrec.datasets.folder.data_folder import DataFolder
from findrec.datasets.folder.in_memory import write_data_folder
from findrec.datasets.folder.shards import BLOCK, ShardReader
from findrec.datasets.folder.verify import check_folder
from findrec.errors import FindRecError
from findrec.files import sha256_file

SHARD = "shards/events-00000.tar"
Members = dict[str, bytes]


@pytest.fixture
def path(tmp_path: Path) -> Path:
    rng = np.random.default_rng(0)
    histories = [rng.integers(1, 30, n).tolist() for n in rng.integers(3, 20, 12)]
    features = {"image": rng.normal(size=(30, 4)).astype(np.float32)}
    write_data_folder(tmp_path / "data", histories, num_items=30, users_per_member=4, features=features)
    return tmp_path / "data"


def members(shard: Path) -> Members:
    with tarfile.open(shard) as tar:
        return {info.name: tar.extractfile(info).read() for info in tar}  # type: ignore[union-attr]


def fit_manifest(path: Path, **changes: Any) -> None:
    """Update all hashes and sizes in the manifest."""
    tree = json.loads((path / "manifest.json").read_text()) | changes
    for entry in tree["shards"]:
        entry |= {"sha256": sha256_file(path / entry["name"]), "bytes": (path / entry["name"]).stat().st_size}
    tree["files"] = {name: sha256_file(path / name) for name in tree["files"]}
    (path / "manifest.json").write_text(json.dumps(tree))


def pack(shard: Path, content: Members) -> None:
    with tarfile.open(shard, "w", format=tarfile.USTAR_FORMAT) as tar:
        for name, data in content.items():
            info = tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))


def npy(values: Any, **kwargs: Any) -> bytes:
    buffer = io.BytesIO()
    np.lib.format.write_array(buffer, np.asarray(values), **({"version": (1, 0)} | kwargs))
    return buffer.getvalue()


def array(data: bytes) -> Any:
    return np.load(io.BytesIO(data))


def set_event(column: str, place: int, value: int) -> Callable[[Members], None]:
    def change(content: Members) -> None:
        values = array(content[f"000001.{column}.npy"])
        values[place] = value
        content[f"000001.{column}.npy"] = npy(values)

    return change


def put(name: str, data: bytes) -> Callable[[Members], None]:
    return lambda content: content.update({name: data})


def shorten(content: Members) -> None:
    content["000001.item.npy"] = npy(array(content["000001.item.npy"])[:-1])


def drop(content: Members) -> None:
    for name in [name for name in content if name.startswith("000002.")]:
        del content[name]


INVALID = {
    "item beyond the catalogue": (set_event("item", 3, 31), r"in sample 000001 an item of user row \d+ lies"),
    "padding as an item": (set_event("item", 3, 0), "lies outside the catalogue 1..30"),
    "time goes back": (
        set_event("timestamp", 2, -5),
        r"sample 000001 the timestamps of user row \d+ decrease",
    ),
    "users cut otherwise": (set_event("offset", 1, 1), "users of sample 000001 differ"),
    "offset beyond the events": (set_event("offset", -1, 1 << 40), "users of sample 000001 differ"),
    "columns of two lengths": (shorten, "columns of sample 000001 differ in length"),
    "extra sample": (
        put("000009.item.npy", npy(np.ones(2, "<i4"))),
        "sample 000009 has missing or unexpected columns",
    ),
    "extra column": (
        put("000001.value.npy", npy(np.ones(2, "<f4"))),
        "sample 000001 has missing or unexpected columns: value",
    ),
    "unknown column": (put("000001.extra.npy", npy(np.ones(2, "<i8"))), "is an unknown column"),
    "lost sample": (drop, "it has 2 samples, users.parquet has 3"),
    "other numbers": (put("000001.item.npy", npy(np.ones(9, "<i8"))), "dtype <i8 instead of <i4"),
    "a table": (put("000001.item.npy", npy(np.ones((3, 3), "<i4"))), "not a flat .npy array"),
    "pickle": (
        put("000001.item.npy", npy(np.array([{}], dtype=object), allow_pickle=True)),
        "000001.item.npy' is not a flat .npy array of numbers .pickles are rejected",
    ),
    "pickle by name": (
        put("000001.item.pkl", b"cos\nsystem\n"),
        "'000001.item.pkl' does not have the name",
    ),
}


@pytest.mark.parametrize("kind", INVALID)
def test_invalid_shards_are_rejected_by_verify_and_when_read(path: Path, kind: str) -> None:
    change, message = INVALID[kind]
    content = members(path / SHARD)
    change(content)
    pack(path / SHARD, content)
    fit_manifest(path)
    with pytest.raises(FindRecError, match=rf"events-00000\.tar cannot be read: .*{message}.*--force"):
        check_folder(path)
    folder = DataFolder.open(path)  # hashes fit
    for impl in ("auto", "reference"):
        with pytest.raises(FindRecError, match=message):
            folder.histories(np.arange(folder.num_users), impl=impl)  # type: ignore[arg-type]


def header(name: str, size: bytes, kind: bytes = b"0") -> bytes:
    """A tar header with a correct checksum."""
    block = bytearray(BLOCK)
    block[: len(name)] = name.encode()
    block[124 : 124 + len(size)] = size
    block[156:157] = kind
    block[257:265] = b"ustar\x0000"
    block[148:156] = b" " * 8
    block[148:155] = b"%06o\0" % sum(block)
    return bytes(block)


@pytest.mark.parametrize(
    ("head", "message"),
    [
        (header("000000.item.npy", b"%011o" % (8 << 30 - 1)), "should have .* bytes, 1,024 are left"),
        (
            header("000000.item.npy", b"\x80" + (10 << 30).to_bytes(11, "big")),
            "has an invalid size",
        ),
        (header("000000.item.npy", b"-0000000777"), "has an invalid size"),
        (header("000000.item.npy", b""), "has an invalid size"),
        (header("000000.item.npy", b"%011o" % 4, kind=b"1"), "is not a regular file"),
        (header("000000.item.npy", b"%011o" % 4, kind=b"x"), "is not a regular file"),
        (header("/etc/000000.item.npy", b"%011o" % 4), "does not have the name of"),
        (header("../000000.item.npy", b"%011o" % 4), "does not have the name of"),
        (header("000000.item.npy", b"%011o" % 4)[:-1] + b"x", "wrong checksum"),
        (b"", "no end-of-archive|cannot mmap"),
    ],
)
def test_invalid_headers_are_rejected(tmp_path: Path, head: bytes, message: str) -> None:
    (tmp_path / "bad.tar").write_bytes(head + bytes(2 * BLOCK if head else 0))
    with pytest.raises(FindRecError, match=rf"bad\.tar cannot be read: .*({message})"):
        ShardReader(tmp_path / "bad.tar")


def test_truncated_shards_are_rejected(path: Path) -> None:
    data = (path / SHARD).read_bytes()
    end = len(data.rstrip(b"\0"))
    for size in (0, 1, BLOCK, BLOCK + 7, end // 2, end - 600, end // BLOCK * BLOCK):
        (path / SHARD).write_bytes(data[:size])
        with pytest.raises(FindRecError, match=r"events-00000\.tar was altered: it has"):
            DataFolder.open(path, verify=False)
        with pytest.raises(FindRecError, match=r"cannot be read"):
            ShardReader(path / SHARD)


def test_flipped_bytes_in_unverified_shards_give_errors_or_valid_events(path: Path) -> None:
    """After any change of one byte, reading raises an error or returns valid events."""
    data = bytearray((path / SHARD).read_bytes())
    rng = np.random.default_rng(0)
    refused = 0
    for place in rng.integers(0, len(data), 150):
        changed = bytearray(data)
        changed[place] ^= 1 << int(rng.integers(8))
        (path / SHARD).write_bytes(changed)
        with pytest.raises(FindRecError, match="was altered: its sha256"):
            check_folder(path)
        folder = DataFolder.open(path, verify=False)
        try:
            read = folder.histories(np.arange(folder.num_users))
        except FindRecError:
            refused += 1
            continue
        assert 1 <= read.item.min() <= read.item.max() <= 30
    assert refused > 10


def edit_users(path: Path, change: Callable[[dict[str, Any]], Any]) -> None:
    table = pq.read_table(path / "users.parquet")
    columns: dict[str, Any] = {name: table[name].to_numpy().copy() for name in table.column_names}
    columns["raw"] = columns["raw"].astype(str)
    change(columns)
    pq.write_table(pa.table(columns), path / "users.parquet")
    fit_manifest(path)


def swap(columns: dict[str, Any], name: str, one: int, two: int) -> None:
    columns[name][[one, two]] = columns[name][[two, one]]


USERS = {
    "swapped users": (lambda c: swap(c, "row", 0, 1), "not in the order"),
    "swapped members": (lambda c: swap(c, "member", 0, 4), "not in the order"),
    "another shard": (
        lambda c: c["shard"].__setitem__(slice(8, None), 1),
        "not in the order|different numbers",
    ),
    "longer user": (lambda c: c["length"].__setitem__(0, 99), "12 users with"),
    "test before validation": (lambda c: c["test_start"].__setitem__(0, 0), "a split outside its history"),
    "negative cut": (lambda c: c["valid_start"].__setitem__(0, -1), "a split outside its history"),
    "lost column": (lambda c: c.pop("member"), "cannot be read"),
}


@pytest.mark.parametrize("kind", USERS)
def test_users_tables_that_do_not_match_the_manifest(path: Path, kind: str) -> None:
    change, message = USERS[kind]
    edit_users(path, change)
    with pytest.raises(FindRecError, match=rf"users\.parquet.*({message}).*--force"):
        DataFolder.open(path)


def test_users_of_other_lengths_are_detected_in_the_shard(path: Path) -> None:
    def change(columns: dict[str, Any]) -> None:
        columns["length"][:2] += [1, -1]
        columns["test_start"][:2] = columns["valid_start"][:2] = 1

    edit_users(path, change)
    with pytest.raises(FindRecError, match="users of sample 000000 differ"):
        DataFolder.open(path).histories([0])


def edit_features(path: Path, change: Callable[[dict[str, Any]], None]) -> None:
    file = path / "features/image.safetensors"
    tensors = load_file(file)
    change(tensors)
    save_file(tensors, file)
    fit_manifest(path)


def not_a_number(tensors: dict[str, Any]) -> None:
    tensors["values"][7, 2] = np.nan


def wider(tensors: dict[str, Any]) -> None:
    tensors["values"] = np.concatenate([tensors["values"]] * 2, axis=1)


def fewer(tensors: dict[str, Any]) -> None:
    tensors["values"], tensors["present"] = tensors["values"][:-1], tensors["present"][:-1]


def flat(tensors: dict[str, Any]) -> None:
    tensors["values"] = tensors["values"].ravel()


def absent(tensors: dict[str, Any]) -> None:
    tensors["present"][4] = False


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (not_a_number, "features of item 7 are not finite"),
        (wider, "31 rows of width 8, manifest.json says 30 items and width 4"),
        (fewer, "30 rows of width 4"),
        (flat, "do not have a row for each item"),
        (absent, "does not lack exactly 0 items"),
    ],
)
def test_invalid_feature_tables_are_rejected(
    path: Path, change: Callable[[dict[str, Any]], None], message: str
) -> None:
    edit_features(path, change)
    with pytest.raises(FindRecError, match=rf"image\.safetensors.*{message}"):
        check_folder(path)


@pytest.mark.parametrize(
    "name",
    ["/etc/passwd", "../events.tar", "shards/../../x.tar", "pipe:touch x", "http://x/y.tar", "a\\b", ""],
)
def test_names_outside_the_folder_are_rejected(path: Path, name: str) -> None:
    tree = json.loads((path / "manifest.json").read_text())
    for kind in ("shards", "features", "files"):
        changed = json.loads(json.dumps(tree))
        if kind == "files":
            changed["files"][name] = "0" * 64
        else:
            changed[kind][0]["name" if kind == "shards" else "file"] = name
        (path / "manifest.json").write_text(json.dumps(changed))
        with pytest.raises(FindRecError, match="names a file outside the folder"):
            DataFolder.open(path)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"schema_version": 2}, "schema version 2"),
        ({"event_types": ["buy"]}, "shards that have no event"),
        ({"num_users": 13}, "12 users with"),
        ({"num_items": 40}, "does not have the ids 1..40 in order"),
        ({"surprise": 1}, "is damaged"),
    ],
)
def test_manifests_that_contradict_the_files(path: Path, changes: dict[str, Any], message: str) -> None:
    fit_manifest(path, **changes)
    with pytest.raises(FindRecError, match=message):
        check_folder(path)


def test_event_codes_must_have_names(tmp_path: Path) -> None:
    write_data_folder(tmp_path / "data", [[1, 2, 3]], events=[["a", "b", "a"]])
    assert check_folder(tmp_path / "data").num_users == 1
    fit_manifest(tmp_path / "data", event_types=["a"])
    with pytest.raises(FindRecError, match=r"type that manifest\.json does not list"):
        check_folder(tmp_path / "data")


def test_verify_command(path: Path) -> None:
    runner = CliRunner()
    assert "complete and unchanged" in runner.invoke(app, ["verify", str(path)]).output
    (path / SHARD).unlink()
    result = runner.invoke(app, ["verify", str(path)])
    assert isinstance(result.exception, FindRecError)
    assert f"{SHARD} is missing" in str(result.exception)
    for place in ("pipe:cat manifest.json", "ftp://x/data"):
        result = runner.invoke(app, ["verify", place])
        assert isinstance(result.exception, FindRecError)
        assert "never run" in str(result.exception)
