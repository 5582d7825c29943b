"""A data folder on a web server or in an object store, read through a bounded cache on this machine.

The manifest, tables and features are fetched when the folder is opened, shards when they are first needed or,
by threads that run ahead in the order a plan needs them, before. A file counts only once its sha256 is the
manifest's; it appears in the cache by a rename, so workers of one machine share the cache and a killed one
leaves nothing half-written behind. Shards that were used longest ago make room for others.
"""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import os
import re
import shutil
import threading
import time
import urllib.error
import urllib.request
from collections import deque
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from urllib.parse import urlsplit, urlunsplit

import fsspec.core

from findrec.datasets.manifest import MANIFEST_NAME, Manifest, read_manifest, sha256_file
from findrec.errors import FindRecError
from findrec.paths import home
from findrec.progress import say

SCHEMES = ("http", "https", "s3", "gs")
TRIES = 6
FIRST_PAUSE_S = 0.5  # doubles with each try
SILENCE_S = 20.0  # without a byte for so long a connection counts as lost
LEFT_S = 3600.0  # a part that nothing was added to for so long was left by a process that was killed
PIECE = 1 << 20
AHEAD = 4  # shards fetched at a time
CACHE_BYTES = 64 << 30
MANIFEST_BYTES = 1 << 30  # more than any manifest


class TransferError(Exception):
    """One try failed in a way that another may not."""


class GoneError(Exception):
    """What is asked for cannot be had, however often it is tried."""


def is_remote(place: str | Path) -> bool:
    """Whether a place is an address and no path. `FindRecError` for schemes that are not read."""
    found = re.match(r"([A-Za-z][A-Za-z0-9+.-]+):", str(place)) if isinstance(place, str) else None
    if found is None:
        return False
    if found[1].lower() in SCHEMES and str(place)[found.end() :].startswith("//"):
        return True
    raise FindRecError(
        f"a data folder cannot be read from {place!r}: give a local path or an address that begins with "
        f"{', '.join(f'{scheme}://' for scheme in SCHEMES)} (commands such as pipe: are never run)"
    )


def _pieces(url: str, begin: int) -> Iterator[bytes]:
    """The bytes of a file from `begin` on."""
    if not url.startswith(("http://", "https://")):
        yield from _object_pieces(url, begin)
        return
    request = urllib.request.Request(url, headers={"Range": f"bytes={begin}-"} if begin else {})
    try:
        with urllib.request.urlopen(request, timeout=SILENCE_S) as answer:
            left = begin if answer.status != 206 else 0  # a server may ignore the range
            expected, got = answer.headers.get("Content-Length"), 0
            while piece := answer.read1(PIECE):
                got += len(piece)
                if left >= len(piece):
                    left -= len(piece)
                    continue
                yield piece[left:]
                left = 0
            if expected is not None and got < int(expected):
                raise TransferError(f"the connection ended after {got:,} of {int(expected):,} bytes")
    except urllib.error.HTTPError as error:
        told = f"HTTP {error.code} {error.reason}"
        if error.code in (408, 416, 425, 429) or error.code >= 500:
            raise TransferError(told) from None
        raise GoneError(told) from None
    except urllib.error.URLError as error:
        raise TransferError(str(error.reason)) from None
    except (OSError, ValueError, EOFError) as error:
        raise TransferError(str(error) or type(error).__name__) from None
    except Exception as error:  # http.client's own, such as IncompleteRead
        if type(error).__module__ != "http.client":
            raise
        raise TransferError(str(error) or type(error).__name__) from None


def _object_pieces(url: str, begin: int) -> Iterator[bytes]:
    """The same from an object store; the store's own client finds the credentials."""
    try:
        files, path = fsspec.core.url_to_fs(url)
        with files.open(path, "rb") as stream:
            stream.seek(begin)
            while piece := stream.read(PIECE):
                yield piece
    except ImportError as error:
        raise GoneError(f"{error} (s3:// needs the package s3fs, gs:// gcsfs)") from None
    except FileNotFoundError:
        raise GoneError("no such object") from None
    except Exception as error:  # each store's client has exceptions of its own
        raise TransferError(f"{type(error).__name__}: {error}") from None


def download(url: str, target: Path, *, sha256: str | None = None, at_most: int | None = None) -> None:
    """Fetch a file to `target`, which appears when it is complete and has the right hash.

    Lost connections are taken up where they broke, wrong bytes fetched anew, with pauses that double.
    `FindRecError` after `TRIES` tries, or at once where trying again would not help.
    """
    part = target.with_name(f".{target.name}.part-{os.getpid()}-{threading.get_ident()}")
    problem = ""
    try:
        part.parent.mkdir(parents=True, exist_ok=True)
        for attempt in range(TRIES):
            if attempt:
                time.sleep(FIRST_PAUSE_S * 2 ** (attempt - 1))
            begin = part.stat().st_size if part.exists() else 0
            try:
                with part.open("ab") as out:
                    for piece in _pieces(url, begin):
                        out.write(piece)
                        if at_most is not None and out.tell() > at_most:
                            out.truncate(0)
                            raise TransferError(f"it is larger than {at_most:,} bytes")
                if sha256 is None or sha256_file(part) == sha256:
                    part.replace(target)
                    return
                part.unlink()
                problem = "its sha256 is not the one in manifest.json"
            except TransferError as error:
                problem = str(error)
                if begin and part.stat().st_size == begin:
                    part.unlink()  # going on where it broke does not work here
            except GoneError as error:
                problem = str(error)
                break
    except OSError as error:
        raise _cannot_keep(url, target, error) from None
    finally:
        part.unlink(missing_ok=True)
    raise FindRecError(
        f"cannot fetch {url}: {problem} (tried {attempt + 1} time{'s' if attempt else ''}). Check the "
        "address and the network, or copy the data folder here and set data.folder to it."
    )


class RemoteFolder:
    """The files of a remote data folder; all but its shards lie in `path` once `fetch_tables` was called.

    The shards of all remote folders together take about `cache_bytes` on this machine (but always one): those
    used longest ago are dropped, and fetched again where they are needed. Processes share the cache.
    """

    def __init__(self, url: str, cache_bytes: int | None = None) -> None:
        parts = urlsplit(url)
        self.url = urlunsplit(parts._replace(path=parts.path.rstrip("/")))
        self.cache_bytes = _cache_bytes(cache_bytes)
        self._cache = home() / "data" / ".remote"
        folder = self._cache / hashlib.sha256(self.url.encode()).hexdigest()[:16]
        name = Path(parts.path).name or "data"
        # Fetched each time: the folder may have been made again, and `path` holds one version of it.
        fresh = folder / f"{os.getpid()}-{threading.get_ident()}" / name
        try:
            download(self._address(MANIFEST_NAME), fresh / MANIFEST_NAME, at_most=MANIFEST_BYTES)
            self.manifest: Manifest = read_manifest(fresh)
            self.path = folder / sha256_file(fresh / MANIFEST_NAME)[:16] / name
            self.path.mkdir(parents=True, exist_ok=True)
            (fresh / MANIFEST_NAME).replace(self.path / MANIFEST_NAME)
        except FindRecError as error:
            raise FindRecError(str(error).replace(str(fresh), self.url)) from None
        except OSError as error:
            raise _cannot_keep(self.url, folder, error) from None
        finally:
            shutil.rmtree(fresh.parent, ignore_errors=True)
        self._wanted: deque[int] = deque()
        self._coming: dict[int, int] = {}  # shards being fetched by this process -> bytes

    def _address(self, name: str) -> str:
        parts = urlsplit(self.url)
        return urlunsplit(parts._replace(path=f"{parts.path}/{name}"))

    def fetch_tables(self, *, verify: bool = True) -> None:
        """Everything but the shards. With `verify`, what was altered in the cache goes."""
        for name, digest in self.manifest.files.items():
            target = self.path / name
            with _locked(target):
                if not target.is_file() or (verify and sha256_file(target) != digest):
                    download(self._address(name), target, sha256=digest)
        for entry in self.manifest.shards if verify else ():
            target = self.path / entry.name
            with contextlib.suppress(FileNotFoundError):
                if sha256_file(target) != entry.sha256:
                    target.unlink()

    def shard(self, number: int) -> Path:
        """The file of a shard, fetched where it is not at hand; waits for a thread that is fetching it."""
        entry = self.manifest.shards[number]
        target = self.path / entry.name
        with _locked(target):
            if target.is_file() and target.stat().st_size == entry.bytes:
                os.utime(target)
                return target
            with _locked(self._cache / "room"):
                self._coming[number] = entry.bytes
                self._make_room()
            try:
                download(self._address(entry.name), target, sha256=entry.sha256, at_most=entry.bytes)
            finally:
                del self._coming[number]
        return target

    def ahead(self, shards: Iterable[int]) -> None:
        """Fetch these shards in the background, in this order, as many as the cache holds."""
        total = sum(entry.bytes for entry in self.manifest.shards)
        if total > self.cache_bytes:
            say(
                f"the shards of {self.url} have {total:,} bytes, the cache {self.cache_bytes:,} "
                "(data.cache_bytes): a shuffled epoch needs all of them all the time, so most will be "
                "fetched again and again"
            )
        room, wanted = self.cache_bytes, []
        for number in shards:
            room -= self.manifest.shards[number].bytes
            if room < 0:
                break
            if not (self.path / self.manifest.shards[number].name).is_file():
                wanted.append(number)
        self._wanted = deque(wanted)
        for _ in range(min(AHEAD, len(wanted))):  # daemons: a process that ends does not wait for them
            threading.Thread(
                target=self._work, args=(self._wanted,), name="findrec-fetch", daemon=True
            ).start()

    def _work(self, wanted: deque[int]) -> None:
        while wanted and wanted is self._wanted:  # else somebody asked for others since
            with contextlib.suppress(IndexError, FindRecError):  # told where the shard itself is asked for
                self.shard(wanted.popleft())

    def _make_room(self) -> None:
        """Drop the files used longest ago. One that a process has mapped stays readable to it."""
        kept = []
        for folder, _, names in os.walk(self._cache):  # heedless of what vanishes meanwhile
            for file in (Path(folder) / name for name in names):
                with contextlib.suppress(FileNotFoundError):
                    stat = file.stat()
                    if file.suffix == ".tar":
                        kept.append((stat.st_mtime_ns, stat.st_size, file))
                    elif ".part-" in file.name and stat.st_mtime < time.time() - LEFT_S:
                        file.unlink()
        room = self.cache_bytes - sum(self._coming.values()) - sum(size for _, size, _ in kept)
        for _, size, file in sorted(kept):
            if room >= 0:
                return
            file.unlink(missing_ok=True)
            room += size


def _cannot_keep(url: str, where: Path, error: OSError) -> FindRecError:
    return FindRecError(
        f"cannot keep {url} at {where}: {error.strerror or error}. Set FINDREC_HOME to a folder that you may "
        "write to, with enough space, or data.cache_bytes to less."
    )


def _cache_bytes(given: int | None) -> int:
    text = os.environ.get("FINDREC_CACHE_BYTES", "")
    if given is not None or not text:
        return CACHE_BYTES if given is None else given
    if not text.isdigit():
        raise FindRecError(f"FINDREC_CACHE_BYTES is {text!r}: give a whole number of bytes")
    return int(text)


@contextmanager
def _locked(target: Path) -> Iterator[None]:
    """One at a time works on `target`, among threads and processes."""
    lock_file = target.with_name(f".{target.name}.lock")
    lock_file.parent.mkdir(parents=True, exist_ok=True)
    with lock_file.open("w") as handle:
        fcntl.flock(handle, fcntl.LOCK_EX)  # released when the process ends, however it ends
        yield
