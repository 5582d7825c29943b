"""Damaged files of every kind: `prepare` succeeds with the right data or raises a `FindRecError`."""

from __future__ import annotations

import bz2
import gzip
import io
import json
import lzma
import random
import struct
import tarfile
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from small_recipe import compress, recipe_tree, small_recipe

from findrec.datasets.prepare.pipeline import prepare
from findrec.datasets.sources.recipe import load_recipe
from findrec.datasets.sources.unpack import check_unpacked
from findrec.errors import FindRecError

EVENTS = 'SELECT "user", item, timestamp FROM {log}'
ROWS = [(f"u{n % 7}", f"i{n * 7 % 11}", 1000 + n) for n in range(60)]


@pytest.fixture(autouse=True)
def cache(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FINDREC_HOME", str(tmp_path_factory.mktemp("home")))


def csv(delimiter: str = ",", header: str = "user,item,timestamp") -> bytes:
    lines = [header.replace(",", delimiter), *(delimiter.join(map(str, row)) for row in ROWS)]
    return ("\n".join(lines) + "\n").encode()


def objects() -> list[dict[str, Any]]:
    return [dict(zip(("user", "item", "timestamp"), row, strict=True)) for row in ROWS]


def parquet() -> bytes:
    out = io.BytesIO()
    pq.write_table(pa.Table.from_pylist(objects()), out)
    return out.getvalue()


def tar(members: dict[str, bytes], packed: Callable[[bytes], bytes] = bytes) -> bytes:
    out = io.BytesIO()
    with tarfile.open(fileobj=out, mode="w") as bundle:
        for name, data in members.items():
            info = tarfile.TarInfo(name)
            info.size = len(data)
            bundle.addfile(info, io.BytesIO(data))
    return packed(out.getvalue())


def samples() -> dict[str, bytes]:
    members = {}
    for user in range(7):
        out = io.BytesIO()
        np.save(out, np.arange(5))
        members |= {f"u{user}.item.npy": out.getvalue(), f"u{user}.timestamp.json": b"[1, 2, 3, 4, 5]"}
    return members


def zipped(method: int) -> bytes:
    out = io.BytesIO()
    with zipfile.ZipFile(out, "w", method) as bundle:
        bundle.writestr("log.csv", csv())
    return out.getvalue()


TO_MANY = {"other.txt": b"x" * 5000, "log.csv": csv()}
# name of the file -> its bytes, and the keys of the recipe's file
FILES: dict[str, tuple[bytes, dict[str, Any]]] = {
    "log.csv": (csv(), {"format": "csv"}),
    "own.csv": (csv(), {}),
    "log.tsv": (csv("\t"), {"format": "tsv"}),
    "log.csv.gz": (gzip.compress(csv(), mtime=0), {"format": "csv"}),
    "log.csv.zst": (compress(".zst", csv()), {"format": "csv"}),
    "log.jsonl": ("\n".join(map(json.dumps, objects())).encode(), {"format": "jsonl"}),
    "log.json": ("\n".join(map(repr, objects())).encode(), {"format": "loose_json"}),
    "log.json.gz": (
        gzip.compress("\n".join(map(repr, objects())).encode(), mtime=0),
        {"format": "loose_json"},
    ),
    "log.parquet": (parquet(), {"format": "parquet"}),
    "log.txt": (b"u1 3 4 5 6\nu2 3 4\nu3 5 6 7\n" + b"u4" + b" 9" * 99, {"format": "sequences"}),
    "log.inter": (csv("\t", "user:token,item:token,timestamp:float"), {"format": "recbole"}),
    "log.tar": (tar(samples()), {"format": "webdataset"}),
    "log.tgz": (tar(samples(), lambda data: gzip.compress(data, mtime=0)), {"format": "webdataset"}),
    "stored.zip": (zipped(zipfile.ZIP_STORED), {"member": "log.csv", "format": "csv"}),
    "deflated.zip": (zipped(zipfile.ZIP_DEFLATED), {"member": "log.csv", "format": "csv"}),
    "bzip2.zip": (zipped(zipfile.ZIP_BZIP2), {"member": "log.csv", "format": "csv"}),
    "lzma.zip": (zipped(zipfile.ZIP_LZMA), {"member": "log.csv", "format": "csv"}),
    "many.tar": (tar(TO_MANY), {"member": "log.csv", "format": "csv"}),
    "many.tgz": (
        tar(TO_MANY, lambda data: gzip.compress(data, mtime=0)),
        {"member": "log.csv", "format": "csv"},
    ),
    "many.tar.xz": (tar(TO_MANY, lzma.compress), {"member": "log.csv", "format": "csv"}),
    "many.tar.bz2": (tar(TO_MANY, bz2.compress), {"member": "log.csv", "format": "csv"}),
}


def tree_of(name: str) -> dict[str, Any]:
    keys = FILES[name][1]
    events = EVENTS if "format" in keys else EVENTS.replace("{log}", "read_csv({log})")
    if keys.get("format") == "webdataset":
        events = 'SELECT __key__ AS "user", item, timestamp FROM {log}'
    tree = recipe_tree(events=events, max_bad_rows=0.5)
    tree["sources"] = {"files": [{"path": name, "files": {"log": keys}}]}
    return tree


def prepared(folder: Path, name: str, data: bytes) -> Any:
    (folder / name).write_bytes(data)
    tree = tree_of(name)
    recipe = small_recipe(folder, **{k: v for k, v in tree.items() if k != "sources"})
    whole = type(recipe).model_validate({**tree, "folder": folder})
    return prepare(whole, folder / "data", force=True)


def damaged(data: bytes, rng: random.Random) -> bytes:
    """Flip bits, cut the end, or overwrite or insert some bytes."""
    out = bytearray(data)
    for _ in range(rng.choice([1, 1, 3])):
        at = rng.randrange(len(out) or 1)
        kind = rng.choice(["flip", "flip", "cut", "fill", "insert"])
        if kind == "cut" or not out:
            del out[at:]
        elif kind == "flip":
            out[at] ^= 1 << rng.randrange(8)
        elif kind == "fill":
            out[at : at + 8] = rng.choice([b"\0" * 8, b"\xff" * 8, b'"' * 8])
        else:
            out[at:at] = rng.choice([b"\n", b'"', b"\0", b"\xe9", b",", b"\t", b"1e999", b"[" * 3000])
    return bytes(out)


@pytest.mark.parametrize("name", FILES)
def test_damage_of_any_kind_is_reported_or_harmless(tmp_path: Path, name: str) -> None:
    data = FILES[name][0]
    expected = prepared(tmp_path, name, data).manifest
    has_checksum = name.endswith((".gz", "gz", ".zip", ".xz", ".bz2"))
    for seed in range(25):
        rng = random.Random(f"{name} {seed}")
        try:
            found = prepared(tmp_path, name, damaged(data, rng)).manifest
        except FindRecError:
            continue
        assert not has_checksum or found.events_sha256 == expected.events_sha256
    assert {path.name for path in tmp_path.iterdir()} == {name, "data"}


def message(folder: Path, name: str, data: bytes) -> str:
    with pytest.raises(FindRecError) as caught:
        prepared(folder, name, data)
    return str(caught.value)


@pytest.mark.parametrize(
    "name", ["many.tgz", "many.tar.xz", "many.tar.bz2", "deflated.zip", "log.csv.gz", "log.tgz"]
)
def test_a_flipped_bit_or_a_missing_end_is_found(tmp_path: Path, name: str) -> None:
    data = FILES[name][0]
    flipped = bytearray(data)
    at = data.index(b"log.csv") + 60 if name.endswith(".zip") else len(data) // 2
    flipped[at] ^= 4
    for bad in (bytes(flipped), data[: len(data) // 2], data[:-3]):
        assert name in message(tmp_path, name, bad)


def test_altered_content_whose_checksum_was_not_reached(tmp_path: Path) -> None:
    stored = tar(TO_MANY, lambda data: gzip.compress(data, 0, mtime=0))
    altered = stored.replace(b"u1,i7,1001", b"u1,i8,1001")
    assert altered != stored
    assert "many.tgz cannot be unpacked" in message(tmp_path, "many.tgz", altered)


def test_encrypted_and_unknown_zips(tmp_path: Path) -> None:
    data = FILES["deflated.zip"][0]
    local, central = data.index(b"PK\x03\x04"), data.index(b"PK\x01\x02")
    encrypted, unknown = bytearray(data), bytearray(data)
    for at, flags, method in ((local, 6, 8), (central, 8, 10)):
        encrypted[at + flags] |= 1
        unknown[at + method : at + method + 2] = struct.pack("<H", 97)
    assert "encrypted" in message(tmp_path, "deflated.zip", bytes(encrypted))
    assert "compression method" in message(tmp_path, "deflated.zip", bytes(unknown))


def test_a_zstandard_frame_with_a_wrong_checksum(tmp_path: Path) -> None:
    text = csv()[:200]
    header = b"\x28\xb5\x2f\xfd" + bytes([0x24, len(text)]) + struct.pack("<I", len(text) << 3 | 1)[:3]
    path = tmp_path / "log.csv.zst"
    for checksum in (b"\0\0\0\0", b"\1\2\3\4"):
        path.write_bytes(header + text + checksum)
        with pytest.raises(FindRecError, match=r"log\.csv\.zst cannot be unpacked"):
            check_unpacked(path, 200)


def test_a_long_header_of_a_tar_is_not_unpacked(tmp_path: Path) -> None:
    info = tarfile.TarInfo("long")
    info.type, info.size = tarfile.XHDTYPE, 2 << 20
    data = gzip.compress(info.tobuf(tarfile.USTAR_FORMAT) + bytes(2 << 20) + tar(TO_MANY), mtime=0)
    assert "a header has 2,097,152 bytes" in message(tmp_path, "many.tgz", data)


@pytest.mark.parametrize("suffix", [".zip", ".xz", ".bz2"])
def test_compressions_that_are_not_read_directly(tmp_path: Path, suffix: str) -> None:
    (tmp_path / f"log.csv{suffix}").write_bytes(b"anything")
    recipe = small_recipe(
        tmp_path, files={"log": {"member": f"log.csv{suffix}", "format": "csv"}}, events=EVENTS
    )
    with pytest.raises(FindRecError, match=r"unpack it or pack it as \.gz or \.zst"):
        prepare(recipe, tmp_path / "data")


@pytest.mark.parametrize("member", ["", "a**b", "log\0.csv", "."])
def test_members_that_name_no_file(tmp_path: Path, member: str) -> None:
    recipe = small_recipe(tmp_path, files={"log": {"member": member, "format": "csv"}}, events=EVENTS)
    with pytest.raises(FindRecError, match="cannot be read from any of its locations"):
        prepare(recipe, tmp_path / "data")


BASE = "name: mine\ntitle: t\nlicence: l\nsource: s\nevents: SELECT 1\n"


@pytest.mark.parametrize(
    "data",
    [
        BASE.encode()[:-9] + b'"SELECT',
        BASE.encode() + b"sources: \xff\xfe",
        BASE.encode() + b"sources: \0",
        BASE.encode() + b"sources: " + b"[" * 3000,
        BASE.encode() + b"sources: " + b"{a: " * 3000,
        BASE.encode() + b"sources: &a [*a]",
        BASE.encode() + b"sources: !!timestamp x",
        BASE.encode() + b"seed: " + b"9" * 5000,
        BASE.encode() + b"seed: 2020-13-45",
        BASE.encode() + b"1: 2",
        b"? [a]\n: b",
        b"- 1",
        b"",
        b'{"name": "mine", "sources": ',
    ],
)
def test_damaged_recipes(tmp_path: Path, data: bytes) -> None:
    (tmp_path / "recipe.yaml").write_bytes(data)
    with pytest.raises(FindRecError, match=r"recipe\.yaml"):
        load_recipe(str(tmp_path / "recipe.yaml"))


def test_recipes_damaged_at_random(tmp_path: Path) -> None:
    data = Path(__file__).parents[3].joinpath("datasets/kuairand.yaml").read_bytes()
    path = tmp_path / "recipe.yaml"
    num_errors = 0
    for seed in range(100):
        path.write_bytes(damaged(data, random.Random(seed)))
        try:
            load_recipe(str(path))
        except FindRecError:
            num_errors += 1
    assert 0 < num_errors < 100
