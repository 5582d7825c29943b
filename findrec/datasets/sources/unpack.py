"""Check the size and the checksum of compressed sources before they are read.

A file of a few megabytes can unpack to terabytes (a decompression bomb), whereas text logs usually compress
by a factor of 3 to 30. Files beyond the recipe's `max_unpack_ratio` are rejected before they are read. The
checksum of a compressed file is at its end, so it is always read to there.
"""

from __future__ import annotations

import bz2
import gzip
import lzma
import struct
import tarfile
import zipfile
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import IO, Any

import pyarrow as pa

from findrec.datasets.folder.tar_headers import BoundedTarInfo
from findrec.datasets.sources.duckdb_engine import BAR_AFTER_S
from findrec.errors import FindRecError
from findrec.progress import progress

COMPRESSIONS = {".gz": "gzip", ".tgz": "gzip", ".zst": "zstd"}  # suffix -> name in Arrow
ALWAYS_ALLOWED_BYTES = 1 << 30  # whatever the ratio
PIECE = 1 << 22
_MAGIC = {b"\x1f\x8b": "gzip", b"BZh": "bz2", b"\xfd7zXZ\x00": "lzma", b"]\x00\x00": "lzma"}  # first bytes
# What the libraries raise for damaged, encrypted or unknown archives, besides errors of the system.
DAMAGED: tuple[type[Exception], ...] = (zipfile.BadZipFile, tarfile.TarError, zlib.error, lzma.LZMAError)
DAMAGED += (struct.error, EOFError, RuntimeError, ValueError, IndexError, OverflowError)


class TooLargeError(Exception):
    """A stream has more bytes than allowed."""


class TarMember(BoundedTarInfo):
    """Also refuses headers that are damaged or missing, which tarfile takes for the end of the tar."""

    @classmethod
    def fromtarfile(cls, tar: Any) -> Any:
        """Read the next header of a tar."""
        try:
            return super().fromtarfile(tar)
        except tarfile.EOFHeaderError:  # type: ignore[attr-defined]  # the zeros at the end
            raise
        except tarfile.HeaderError as error:
            raise tarfile.ReadError(f"{error} where a member or the end should be (cut short?)") from None


def allowed_bytes(packed: int, max_ratio: float) -> int:
    """Bytes to which a file of `packed` bytes may unpack."""
    return max(ALWAYS_ALLOWED_BYTES, int(packed * max_ratio))


def copy_bounded(stream: IO[bytes], out: IO[bytes] | None, limit: int, name: str = "file") -> None:
    """Copy a stream, or only read it; raises `TooLargeError` once it exceeds `limit` bytes."""
    left = limit
    with progress(f"unpack {name}", unit="bytes", after_s=BAR_AFTER_S) as bar:
        while piece := stream.read(min(PIECE, left + 1)):
            left -= len(piece)
            if left < 0:
                raise TooLargeError(f"unpacks to more than {limit:,} bytes")
            if out is not None:
                out.write(piece)
            bar.advance(len(piece))


def check_archive(path: Path, max_ratio: float) -> None:
    """Read a compressed tar to its end; the members of a zip have checksums of their own.

    Raises:
        TooLargeError: If it unpacks to more than `max_ratio` times its size and 1 GiB.
    """
    with path.open("rb") as raw:
        begin = raw.read(6)
    readers: dict[str, Callable[[Path], Any]] = {"gzip": gzip.open, "bz2": bz2.open, "lzma": lzma.open}
    for magic, kind in _MAGIC.items():
        if begin.startswith(magic):
            with readers[kind](path) as stream:
                copy_bounded(stream, None, allowed_bytes(path.stat().st_size, max_ratio), path.name)


def check_unpacked(path: Path, max_ratio: float) -> None:
    """Decompress a `.gz`, `.tgz` or `.zst` file without storing the result; other files are ignored.

    Raises:
        FindRecError: If the file is damaged, or unpacks to more than `max_ratio` times its size and 1 GiB.
    """
    if path.suffix not in COMPRESSIONS:
        return
    packed = path.stat().st_size
    limit, unpacked = allowed_bytes(packed, max_ratio), 0
    try:
        with (
            pa.OSFile(str(path)) as raw,
            pa.CompressedInputStream(raw, COMPRESSIONS[path.suffix]) as stream,
            progress(f"check {path.name}", total=packed, unit="bytes", after_s=BAR_AFTER_S) as bar,
        ):
            while piece := stream.read(PIECE):
                unpacked += len(piece)
                bar.advance(min(raw.tell(), packed) - bar.done)
                if unpacked > limit:
                    raise FindRecError(
                        f"{path} has {packed:,} bytes and unpacks to more than {limit:,} (the recipe's "
                        f"max_unpack_ratio is {max_ratio:g}): it may be a decompression bomb and was not "
                        "read. If you trust it, raise max_unpack_ratio"
                    )
    except (OSError, pa.ArrowException) as error:
        raise FindRecError(f"{path} cannot be unpacked: {error}. Fetch it again") from None
