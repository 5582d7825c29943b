"""Opens tar files without reading headers of any size into memory."""

from __future__ import annotations

import tarfile
from pathlib import Path
from typing import Any

LARGEST_HEADER = 1 << 18  # bytes of a long name or of extended attributes
MOST_GLOBAL = 100  # extended attributes for all members

_EXTENDED = (tarfile.XHDTYPE, tarfile.XGLTYPE, tarfile.SOLARIS_XHDTYPE)
_LONG = (tarfile.GNUTYPE_LONGNAME, tarfile.GNUTYPE_LONGLINK)


class BoundedTarInfo(tarfile.TarInfo):
    """The `tarinfo` of `tarfile.open` that refuses what tarfile would read into memory at once.

    A compressed gigabyte of extended headers takes a few megabytes in an archive.
    """

    @classmethod
    def frombuf(cls, buf: Any, encoding: str, errors: str) -> Any:
        """See `tarfile.TarInfo.frombuf`; `tarfile.ReadError` for a header that is too large."""
        header = super().frombuf(buf, encoding, errors)
        if header.type in _EXTENDED + _LONG and header.size > LARGEST_HEADER:
            raise tarfile.ReadError(
                f"a header has {header.size:,} bytes, more than {LARGEST_HEADER:,}: it may be an attack"
            )
        return header

    @classmethod
    def fromtarfile(cls, tar: Any) -> Any:
        """See `tarfile.TarInfo.fromtarfile`; `tarfile.ReadError` for too many headers."""
        try:
            member = super().fromtarfile(tar)
        except RecursionError:
            raise tarfile.ReadError("a member has hundreds of headers: it may be an attack") from None
        if len(tar.pax_headers) > MOST_GLOBAL:
            raise tarfile.ReadError(f"it has more than {MOST_GLOBAL} global attributes: it may be an attack")
        return member


def is_tar(path: Path) -> bool:
    """`tarfile.is_tarfile` with bounded headers; a refused header raises when the archive is read."""
    try:
        with tarfile.open(path, tarinfo=BoundedTarInfo):
            return True
    except tarfile.ReadError as error:
        return "attack" in str(error)
    except (tarfile.TarError, EOFError):
        return False
