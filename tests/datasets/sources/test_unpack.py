"""Compressed sources that unpack to far more than their size are rejected before they are read."""

from __future__ import annotations

import gzip
import hashlib
import io
import tarfile
import zipfile
from pathlib import Path

import pytest
from small_recipe import compress, small_recipe

from findrec.datasets.prepare.pipeline import prepare
from findrec.datasets.sources import unpack
from findrec.datasets.sources.fetch import FetchError, extract, fetch_source
from findrec.datasets.sources.recipe import SourceLocation
from findrec.datasets.sources.unpack import TooLargeError, check_unpacked, copy_bounded
from findrec.errors import FindRecError

ROW = b"1,2,3\n"
BOMB = b"user,item,timestamp\n" + ROW * 500_000  # 3 MB that pack into a few kilobytes


@pytest.fixture(autouse=True)
def small_allowance(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(unpack, "ALWAYS_ALLOWED_BYTES", 1 << 20)


@pytest.mark.parametrize("kind", [".gz", ".zst"])
def test_a_decompression_bomb_is_rejected(tmp_path: Path, kind: str) -> None:
    file = tmp_path / f"log.csv{kind}"
    files = {"log": {"member": file.name}}
    file.write_bytes(compress(kind, BOMB))
    with pytest.raises(FindRecError, match=rf"log\.csv{kind} has .* unpacks to more than.*max_unpack_ratio"):
        prepare(small_recipe(tmp_path, files=files), tmp_path / "data")
    assert sorted(path.name for path in tmp_path.iterdir()) == [file.name]
    recipe = small_recipe(tmp_path, files=files, max_unpack_ratio=1e6)
    assert prepare(recipe, tmp_path / "data").manifest.num_events == 500_000


def test_text_with_a_usual_ratio_is_accepted(tmp_path: Path) -> None:
    lines = "".join(f"{n * 7919 % 10007},{n * 104729 % 20011},{n}\n" for n in range(100_000))
    file = tmp_path / "log.csv.gz"
    file.write_bytes(gzip.compress(lines.encode(), mtime=0))
    assert len(lines) > unpack.ALWAYS_ALLOWED_BYTES
    check_unpacked(file, 200)
    with pytest.raises(FindRecError, match=r"is 1\.5\)"):
        check_unpacked(file, 1.5)


@pytest.mark.parametrize("name", ["log.csv.gz", "users.tgz"])
def test_several_gzip_members_count_together(tmp_path: Path, name: str) -> None:
    file = tmp_path / name
    file.write_bytes(gzip.compress(ROW * 100_000, mtime=0) * 4)
    with pytest.raises(FindRecError, match="unpacks to more"):
        check_unpacked(file, 200)


def test_a_damaged_file_is_reported(tmp_path: Path) -> None:
    file = tmp_path / "log.csv.gz"
    file.write_bytes(gzip.compress(bytes(range(256)) * 99, mtime=0)[:200])
    with pytest.raises(FindRecError, match=r"log\.csv\.gz cannot be unpacked"):
        check_unpacked(file, 200)


def test_a_file_with_a_known_sha256_is_not_checked(tmp_path: Path) -> None:
    file = tmp_path / "log.csv.gz"
    file.write_bytes(compress(".gz", BOMB))
    entry = {"member": file.name, "sha256": hashlib.sha256(file.read_bytes()).hexdigest()}
    location = SourceLocation.model_validate({"path": ".", "files": {"log": entry}})
    assert fetch_source("files", [location], tmp_path).files["log"] == [file]


@pytest.mark.parametrize("kind", ["zip", "tar"])
def test_a_bomb_in_an_archive_is_rejected(tmp_path: Path, kind: str) -> None:
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
def test_the_limit_is_exact(limit: int) -> None:
    out = io.BytesIO()
    if limit < 10:
        with pytest.raises(TooLargeError):
            copy_bounded(io.BytesIO(bytes(10)), out, limit)
        assert out.tell() <= limit
    else:
        copy_bounded(io.BytesIO(bytes(10)), out, limit)
        assert out.tell() == 10
