"""Read a data folder from a web server or object store through a bounded cache on this machine.

The manifest, tables and features are fetched when the folder is opened, shards when they are first needed or
before, by prefetching threads. Files are checked against the manifest's sha256 and renamed into the cache, so
the workers of a machine can share it and a killed one leaves no partial file. The least recently used shards
are dropped first.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import re
import shutil
import threading
import time
from collections import deque
from collections.abc import Iterable
from pathlib import Path
from urllib.parse import urlsplit, urlunsplit

from filelock import BaseFileLock, FileLock

from findrec.datasets.folder.manifest import MANIFEST_NAME, Manifest, read_manifest
from findrec.datasets.folder.transfer import TransferError, UnavailableError, read_pieces
from findrec.errors import FindRecError
from findrec.files import replacing, sha256_file
from findrec.paths import home
from findrec.progress import progress, say

SCHEMES = ("http", "https", "s3", "gs")
TRIES = 6
FIRST_PAUSE_S = 0.5  # doubles with each try
STALE_S = 3600.0  # partial files that have not grown for so long belong to killed processes
PREFETCH, PREFETCH_THREADS = "findrec-fetch", 4
BAR_AFTER_S = 5.0
BASE_BYTES, ROW_BYTES = 1 << 30, 1 << 16  # largest table: of no items, and for each item
CACHE_BYTES = 64 << 30
MANIFEST_BYTES = 1 << 30  # largest manifest
_ROOM = threading.Lock()  # a file lock polls, so threads of this process could overtake each other


def is_remote(location: str | Path) -> bool:
    """Whether a location is a URL rather than a path; `FindRecError` for other schemes."""
    match = re.match(r"([A-Za-z][A-Za-z0-9+.-]+):", location) if isinstance(location, str) else None
    if match is None:
        return False
    if match[1].lower() in SCHEMES and str(location)[match.end() :].startswith("//"):
        return True
    raise FindRecError(
        f"a data folder cannot be read from {location!r}: use a local path or a URL that begins with "
        f"{', '.join(f'{scheme}://' for scheme in SCHEMES)} (commands such as pipe: are never run)"
    )


def download(url: str, target: Path, *, sha256: str | None = None, at_most: int | None = None) -> None:
    """Fetch a file to `target`, which exists only once it is complete and has the right hash.

    Lost connections are resumed and wrong bytes fetched again, with exponential backoff. A file of more than
    `at_most` bytes, or more than the disk has room for, is refused. Raises `FindRecError` after `TRIES`
    attempts, or at once if another attempt would not help.
    """
    problem = ""
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        room = shutil.disk_usage(target.parent).free
        limit = room if at_most is None else min(room, at_most)
        with (
            replacing(target) as part,
            progress(
                f"fetch {target.name}",
                unit="bytes",
                after_s=BAR_AFTER_S,
                show=threading.current_thread().name != PREFETCH,
            ) as bar,
        ):

            def show_size(size: int) -> None:
                bar.total = size
                if size > limit:
                    raise UnavailableError(f"it has {size:,} bytes, more than {limit:,}")

            for attempt in range(TRIES):
                if attempt:
                    time.sleep(FIRST_PAUSE_S * 2 ** (attempt - 1))
                begin = part.stat().st_size if part.exists() else 0
                try:
                    with part.open("ab") as out:
                        for piece in read_pieces(url, begin, on_size=show_size):
                            out.write(piece)
                            bar.advance(out.tell() - bar.done)
                            if out.tell() > limit:
                                raise UnavailableError(f"it is larger than {limit:,} bytes")
                    if sha256 is None or sha256_file(part) == sha256:
                        return
                    part.unlink()
                    problem = "its sha256 is not the one in manifest.json"
                except TransferError as error:
                    problem = str(error)
                    if begin and part.stat().st_size == begin:
                        part.unlink()  # the transfer cannot be resumed
                except UnavailableError as error:
                    problem = str(error)
                    break
            raise FindRecError(
                f"cannot fetch {url}: {problem} (tried {attempt + 1} time{'s' if attempt else ''}). Check "
                "the URL and the network, or copy the data folder here and set data.folder to it."
            )
    except OSError as error:
        raise _cannot_store(url, target, error) from None


class RemoteFolder:
    """The files of a remote data folder; after `fetch_tables`, all but its shards are in `path`.

    The shards of all remote folders together take about `cache_bytes` on this machine (at least one shard).
    The least recently used are dropped, and fetched again when needed. Processes share the cache.
    """

    def __init__(self, url: str, cache_bytes: int | None = None) -> None:
        parts = urlsplit(url)
        self.url = urlunsplit(parts._replace(path=parts.path.rstrip("/")))
        self.cache_bytes = _cache_bytes(cache_bytes)
        self._cache = home() / "data" / ".remote"
        folder = self._cache / hashlib.sha256(self.url.encode()).hexdigest()[:16]
        name = Path(parts.path).name or "data"
        # Always fetched, as the folder may have been made again; `path` has one version of it.
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
            raise _cannot_store(self.url, folder, error) from None
        finally:
            shutil.rmtree(fresh.parent, ignore_errors=True)
        self._queue: deque[int] = deque()
        self._in_flight: dict[int, int] = {}  # shards being fetched by this process -> bytes

    def _address(self, name: str) -> str:
        parts = urlsplit(self.url)
        return urlunsplit(parts._replace(path=f"{parts.path}/{name}"))

    def fetch_tables(self, *, verify: bool = True) -> None:
        """Fetch all files except shards; with `verify`, altered cached files are removed or replaced."""
        for name, digest in self.manifest.files.items():
            target = self.path / name
            with _locked(target):
                if not target.is_file() or (verify and sha256_file(target) != digest):
                    download(self._address(name), target, sha256=digest, at_most=self._largest_table())
        for entry in self.manifest.shards if verify else ():
            target = self.path / entry.name
            with contextlib.suppress(FileNotFoundError):
                if sha256_file(target) != entry.sha256:
                    target.unlink()

    def _largest_table(self) -> int:
        """A bound on the bytes of a table or feature file, whose sizes the manifest does not have."""
        widest = max((feature.dim for feature in self.manifest.features), default=0)
        return (
            BASE_BYTES + self.manifest.num_items * (ROW_BYTES + 4 * widest) + (self.manifest.num_users << 10)
        )

    def shard(self, number: int) -> Path:
        """Path of a shard, which is fetched if necessary; waits for a thread that is already fetching it."""
        entry = self.manifest.shards[number]
        target = self.path / entry.name
        with _locked(target):
            if target.is_file() and target.stat().st_size == entry.bytes:
                os.utime(target)
                return target
            with _ROOM, _locked(self._cache / "room"):
                self._in_flight[number] = entry.bytes
                self._make_room()
            try:
                download(self._address(entry.name), target, sha256=entry.sha256, at_most=entry.bytes)
            finally:
                del self._in_flight[number]
        return target

    def prefetch(self, shards: Iterable[int]) -> None:
        """Fetch shards in the background, in this order, as many as fit into the cache."""
        total = sum(entry.bytes for entry in self.manifest.shards)
        if total > self.cache_bytes:
            say(
                f"the shards of {self.url} have {total:,} bytes, the cache {self.cache_bytes:,} "
                "(data.cache_bytes): a shuffled epoch reads all shards throughout, so most will be fetched "
                "repeatedly"
            )
        room, missing = self.cache_bytes, []
        for number in shards:
            room -= self.manifest.shards[number].bytes
            if room < 0:
                break
            if not (self.path / self.manifest.shards[number].name).is_file():
                missing.append(number)
        self._queue = deque(missing)
        for _ in range(min(PREFETCH_THREADS, len(missing))):
            threading.Thread(target=self._work, args=(self._queue,), name=PREFETCH, daemon=True).start()

    def _work(self, shards: deque[int]) -> None:
        while shards and shards is self._queue:  # ends after a newer call of `prefetch`
            with contextlib.suppress(IndexError, FindRecError):  # raised again when the shard is read
                self.shard(shards.popleft())

    def _make_room(self) -> None:
        """Delete the least recently used files; a process that has mapped one can still read it."""
        shards = []
        for folder, _, names in os.walk(self._cache):  # ignores files that disappear
            for file in (Path(folder) / name for name in names):
                with contextlib.suppress(FileNotFoundError):
                    stat = file.stat()
                    if file.suffix == ".tar":
                        shards.append((stat.st_mtime_ns, stat.st_size, file))
                    elif ".part-" in file.name and stat.st_mtime < time.time() - STALE_S:
                        file.unlink()
        room = self.cache_bytes - sum(self._in_flight.values()) - sum(size for _, size, _ in shards)
        for _, size, file in sorted(shards):
            if room >= 0:
                return
            file.unlink(missing_ok=True)
            room += size


def _cannot_store(url: str, path: Path, error: OSError) -> FindRecError:
    return FindRecError(
        f"cannot store {url} at {path}: {error.strerror or error}. Set FINDREC_HOME to a writable folder "
        "with enough space, or reduce data.cache_bytes."
    )


def _cache_bytes(value: int | None) -> int:
    text = os.environ.get("FINDREC_CACHE_BYTES", "")
    if value is not None or not text:
        return CACHE_BYTES if value is None else value
    if not text.isdigit():
        raise FindRecError(f"FINDREC_CACHE_BYTES is {text!r}: use a whole number of bytes")
    return int(text)


def _locked(target: Path) -> BaseFileLock:
    """One at a time works on `target`, among threads and processes; a killed one releases its lock."""
    target.parent.mkdir(parents=True, exist_ok=True)
    return FileLock(target.with_name(f".{target.name}.lock"), poll_interval=0.01)
