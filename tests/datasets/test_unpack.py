"""Compressed sources that unpack to far more than their size are refused before they are read."""

from __future__ import annotations

import gzip
import hashlib
import io
import tarfile
import zipfile
from pathlib import Path

import pyarrow as pa
import pytest

from findrec.datasets import unpack
from findrec.datasets.fetch import FetchError, extract, fetch_source
from findrec.datasets.prepare import prepare
from findrec.datasets.recipe import Place, Recipe, parse_recipe
from findrec.datasets.unpack import TooLargeError, check_unpacked, copy_bounded
from findrec.errors import FindRecError

ROW = b"1,2,3\n"
BOMB = b"user,item,timestamp\n" + ROW * 500_000  # 3 MB that pack into a few kilobytes


@pytest.fixture(autouse=True)
def little_is_harmless(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(unpack, "HARMLESS_BYTES", 1 << 20)


def packed(kind: str, data: bytes) -> bytes:
    if kind == ".gz":
        return gzip.compress(data, mtime=0)
    sink = pa.BufferOutputStream()
    with pa.CompressedOutputStream(sink, "zstd") as stream:
        stream.write(data)
    return bytes(sink.getvalue())


def recipe_of(folder: Path, name: str, **keys: object) -> Recipe:
    tree = {
        "name": "mine",
        "title": "t",
        "licence": "l",
        "source": "s",
        "sources": {"files": [{"path": ".", "files": {"log": {"member": name}}}]},
        "events": "SELECT * FROM read_csv({log})",
    }
    return parse_recipe(tree | keys, "test", folder)


@pytest.mark.parametrize("kind", [".gz", ".zst"])
def test_a_bomb_in_a_source_is_refused_and_told(tmp_path: Path, kind: str) -> None:
    file = tmp_path / f"log.csv{kind}"
    file.write_bytes(packed(kind, BOMB))
    with pytest.raises(FindRecError, match=rf"log\.csv{kind} has .* unpacks to more than.*max_unpack_ratio"):
        prepare(recipe_of(tmp_path, file.name), tmp_path / "data")
    assert sorted(path.name for path in tmp_path.iterdir()) == [file.name]
    allowed = prepare(recipe_of(tmp_path, file.name, max_unpack_ratio=1e6), tmp_path / "data")
    assert allowed.manifest.num_events == 500_000


def test_text_that_packs_as_text_does_passes(tmp_path: Path) -> None:
    lines = "".join(f"{n * 7919 % 10007},{n * 104729 % 20011},{n}\n" for n in range(100_000))
    file = tmp_path / "log.csv.gz"
    file.write_bytes(gzip.compress(lines.encode(), mtime=0))
    assert len(lines) > unpack.HARMLESS_BYTES
    check_unpacked(file, 200)
    with pytest.raises(FindRecError, match=r"is 1\.5\)"):
        check_unpacked(file, 1.5)


def test_several_gzip_members_count_together(tmp_path: Path) -> None:
    file = tmp_path / "log.csv.gz"
    file.write_bytes(gzip.compress(ROW * 100_000, mtime=0) * 4)
    with pytest.raises(FindRecError, match="unpacks to more"):
        check_unpacked(file, 200)


def test_a_damaged_file_is_named(tmp_path: Path) -> None:
    file = tmp_path / "log.csv.gz"
    file.write_bytes(gzip.compress(bytes(range(256)) * 99, mtime=0)[:200])
    with pytest.raises(FindRecError, match=r"log\.csv\.gz cannot be unpacked"):
        check_unpacked(file, 200)


def test_a_pinned_file_is_what_its_recipe_expects(tmp_path: Path) -> None:
    file = tmp_path / "log.csv.gz"
    file.write_bytes(packed(".gz", BOMB))
    entry = {"member": file.name, "sha256": hashlib.sha256(file.read_bytes()).hexdigest()}
    place = Place.model_validate({"path": ".", "files": {"log": entry}})
    assert fetch_source("files", [place], tmp_path).files["log"] == [file]


@pytest.mark.parametrize("kind", ["zip", "tar"])
def test_a_bomb_in_an_archive_is_refused(tmp_path: Path, kind: str) -> None:
    archive, target = tmp_path / f"a.{kind}", tmp_path / "out/log.csv"
    if kind == "zip":
        with zipfile.ZipFile(archive, "w", zipfile.ZIP_DEFLATED) as bundle:
            bundle.writestr("log.csv", BOMB)
    else:
        with tarfile.open(archive, "w:gz") as tar:
            info = tarfile.TarInfo("log.csv")
            info.size = len(BOMB)
            tar.addfile(info, io.BytesIO(BOMB))
    with pytest.raises(FetchError, match=r"log\.csv of a\..* unpacks to more than.*max_unpack_ratio"):
        extract(archive, "log.csv", target)
    assert list(target.parent.iterdir()) == []
    extract(archive, "log.csv", target, max_ratio=1e6)
    assert target.read_bytes() == BOMB


@pytest.mark.parametrize("limit", [0, 9, 10, 11])
def test_the_bound_is_exact(limit: int) -> None:
    out = io.BytesIO()
    if limit < 10:
        with pytest.raises(TooLargeError):
            copy_bounded(io.BytesIO(bytes(10)), out, limit)
        assert out.tell() <= limit
    else:
        copy_bounded(io.BytesIO(bytes(10)), out, limit)
        assert out.tell() == 10
