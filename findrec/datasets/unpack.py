"""Bounds on what a compressed source may unpack to, so that a small file cannot fill the disk.

A file of a few megabytes can hold terabytes (a "gzip bomb"). Logs of text shrink to a third or a thirtieth;
where a file grows beyond the recipe's `max_unpack_ratio` the work stops before any of it is read as data.
"""

from __future__ import annotations

from pathlib import Path
from typing import IO

import pyarrow as pa

from findrec.datasets.engine import TOLD_AFTER_S
from findrec.errors import FindRecError
from findrec.progress import progress

SUFFIXES = (".gz", ".zst")  # what DuckDB unpacks by itself
HARMLESS_BYTES = 1 << 30  # whatever the ratio, so much may come out of a file
PIECE = 1 << 22


class TooLargeError(Exception):
    """More bytes than were allowed."""


def allowed_bytes(packed: int, max_ratio: float) -> int:
    """How much a file of `packed` bytes may unpack to."""
    return max(HARMLESS_BYTES, int(packed * max_ratio))


def copy_bounded(stream: IO[bytes], out: IO[bytes], limit: int, what: str = "file") -> None:
    """Copy a stream to its end; `TooLargeError` as soon as it gives more than `limit` bytes."""
    left = limit
    with progress(f"unpack {what}", unit="bytes", after_s=TOLD_AFTER_S) as bar:
        while piece := stream.read(min(PIECE, left + 1)):
            if (left := left - len(piece)) < 0:
                raise TooLargeError(f"unpacks to more than {limit:,} bytes")
            out.write(piece)
            bar.advance(len(piece))


def check_unpacked(path: Path, max_ratio: float) -> None:
    """Unpack a `.gz` or `.zst` file into nothing; other files are left alone.

    `FindRecError` where it gives more than `max_ratio` times its size (and more than 1 GiB), or is damaged.
    """
    if path.suffix not in SUFFIXES:
        return
    packed = path.stat().st_size
    limit, done = allowed_bytes(packed, max_ratio), 0
    try:
        with (
            pa.OSFile(str(path)) as raw,
            pa.CompressedInputStream(raw, "gzip" if path.suffix == ".gz" else "zstd") as stream,
            progress(f"check {path.name}", total=packed, unit="bytes", after_s=TOLD_AFTER_S) as bar,
        ):
            while piece := stream.read(PIECE):
                done += len(piece)
                bar.advance(min(raw.tell(), packed) - bar.done)
                if done > limit:
                    raise FindRecError(
                        f"{path} has {packed:,} bytes and unpacks to more than {limit:,} (the recipe's "
                        f"max_unpack_ratio is {max_ratio:g}): it may be made to fill the disk. Nothing of it "
                        "was read. If it is what you expect, raise max_unpack_ratio"
                    )
    except OSError as error:
        raise FindRecError(f"{path} cannot be unpacked: {error}. Fetch it again") from None
