"""What never ends is given up: servers that drip, tables without end, headers without end."""

import contextlib
import gzip
import io
import socket
import subprocess
import sys
import tarfile
import threading
import time

import pytest

from findrec.datasets.encoders.image_files import ImageFiles
from findrec.datasets.folder import remote, transfer
from findrec.datasets.folder.remote import RemoteFolder, download
from findrec.datasets.folder.tar_headers import LARGEST_HEADER, is_tar
from findrec.datasets.sources.fetch import FetchError, downloaded, extract
from findrec.errors import FindRecError

HEAD = b"HTTP/1.1 200 OK\r\n"


@pytest.fixture
def dripping():
    """Starts servers that send `first`, then `piece` every `pause` seconds without end."""
    ended = threading.Event()

    def answer(caller, first, piece, pause):
        with caller, contextlib.suppress(OSError):
            caller.recv(4096)
            caller.sendall(first)
            while not ended.wait(pause):
                caller.sendall(piece)

    def start(first, piece, pause):
        listener = socket.create_server(("127.0.0.1", 0))

        def serve():
            with listener:
                listener.settimeout(0.1)
                while not ended.is_set():
                    with contextlib.suppress(TimeoutError):
                        caller, _ = listener.accept()
                        caller.settimeout(None)
                        threading.Thread(
                            target=answer, args=(caller, first, piece, pause), daemon=True
                        ).start()

        threading.Thread(target=serve, daemon=True).start()
        return f"http://127.0.0.1:{listener.getsockname()[1]}/data"

    yield start
    ended.set()


@pytest.fixture(autouse=True)
def quick(monkeypatch, tmp_path):
    monkeypatch.setattr(transfer, "WINDOW_S", 1.0)
    monkeypatch.setattr(remote, "FIRST_PAUSE_S", 0.001)
    monkeypatch.setenv("FINDREC_HOME", str(tmp_path / "home"))


@pytest.mark.parametrize(
    "first", [HEAD + b"X-Long: ", HEAD + b"\r\n", HEAD + b"Content-Length: 1000000\r\n\r\n"]
)
def test_a_server_that_drips_is_given_up(dripping, tmp_path, first):
    url = dripping(first, b"x", 0.05)
    start = time.monotonic()
    with pytest.raises(FindRecError, match=r"cannot fetch .*too slow: .* bytes in 1 s.*tried 1 time\)"):
        download(url, tmp_path / "file")
    with pytest.raises(FetchError, match="too slow"), downloaded(url):
        pass
    with pytest.raises(FindRecError, match="too slow"):
        RemoteFolder(url)
    assert time.monotonic() - start < 10
    assert list(tmp_path.glob("*file*")) == []


def test_a_slow_but_steady_server_is_waited_for(dripping, tmp_path):
    url = dripping(
        HEAD + b"Content-Length: 6000\r\n\r\n", b"x" * 200, 0.1
    )  # 3 seconds, 2,000 bytes per second
    download(url, tmp_path / "file")
    assert (tmp_path / "file").read_bytes() == b"x" * 6000


def test_a_file_without_end_is_refused(dripping, tmp_path, monkeypatch, capsys):
    monkeypatch.delenv("FINDREC_QUIET", raising=False)
    monkeypatch.setattr(remote, "BAR_AFTER_S", 0.1)
    url = dripping(HEAD + b"\r\n", bytes(4096), 0.01)
    with pytest.raises(FindRecError, match=r"it is larger than 100,000 bytes \(tried 1 time\)"):
        download(url, tmp_path / "file", at_most=100_000)
    assert "fetch file:" in capsys.readouterr().out  # progress
    announced = dripping(HEAD + b"Content-Length: 99999999999999999\r\n\r\n", b"x", 0.01)
    with pytest.raises(FindRecError, match=r"it has 99,999,999,999,999,999 bytes, more than"):
        download(announced, tmp_path / "file")
    assert list(tmp_path.glob("*file*")) == []


def bomb(path, kind, size):
    """A small archive whose first header claims and holds `size` bytes."""
    header = tarfile.TarInfo("././@Header")
    header.type, header.size = kind, size
    with gzip.open(path, "wb", compresslevel=1) as out:
        out.write(header.tobuf(tarfile.USTAR_FORMAT))
        for _ in range(size >> 20):
            out.write(b"1" * (1 << 20))
        log = tarfile.TarInfo("log.csv")
        out.write(log.tobuf() + bytes(1024))


READ = """
import resource, sys
from pathlib import Path
from findrec.datasets.sources.fetch import FetchError, extract
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
try:
    extract(Path(sys.argv[1]), "log.csv", Path(sys.argv[1] + ".out"))
except FetchError as error:
    print(error)
print("KiB", resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before)
"""


@pytest.mark.parametrize("kind", [tarfile.XHDTYPE, tarfile.XGLTYPE, tarfile.GNUTYPE_LONGNAME])
def test_a_huge_header_is_not_read_into_memory(tmp_path, kind):
    path = tmp_path / "a.tgz"
    bomb(path, kind, 256 << 20)
    assert path.stat().st_size < 4 << 20
    done = subprocess.run(
        [sys.executable, "-c", READ, str(path)], capture_output=True, text=True, timeout=120
    )
    assert "a header has 268,435,456 bytes" in done.stdout, done.stderr
    assert int(done.stdout.split()[-1]) < 64 << 10


def test_headers_without_end_are_refused(tmp_path):
    record = b"20 comment=01234567\n"
    chained = tarfile.TarInfo("x")
    chained.type, chained.size = tarfile.XHDTYPE, len(record)
    path = tmp_path / "chain.tar"
    path.write_bytes((chained.tobuf(tarfile.USTAR_FORMAT) + record.ljust(512, b"\0")) * 5000 + bytes(1024))
    with pytest.raises(FetchError, match="hundreds of headers"):
        extract(path, "log.csv", tmp_path / "out")
    with pytest.raises(FindRecError, match="hundreds of headers"):
        ImageFiles(path)


def test_long_names_and_attributes_of_ordinary_size_are_read(tmp_path):
    name, path = "d/" * 2000 + "log.csv", tmp_path / "a.tar"
    for kind in (tarfile.GNU_FORMAT, tarfile.PAX_FORMAT):
        with tarfile.open(path, "w", format=kind) as tar:
            info = tarfile.TarInfo(name)
            info.size, info.pax_headers = 2, {"comment": "ä" * 1000}
            tar.addfile(info, io.BytesIO(b"ok"))
        assert is_tar(path)
        extract(path, name, tmp_path / "out")
        assert (tmp_path / "out").read_text() == "ok"
    assert len(name) < LARGEST_HEADER
    assert not is_tar(tmp_path / "out")
