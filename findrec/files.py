"""Files that appear complete or not at all, their sha256, and reading JSON that may be damaged."""

from __future__ import annotations

import glob
import hashlib
import json
import os
import shutil
import socket
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from findrec.progress import progress


@contextmanager
def replacing(path: Path, *, sync: bool = False) -> Iterator[Path]:
    """A temporary sibling of `path` that takes its place when the block ends without an error.

    After an error the temporary file is removed and `path` is as it was. With `sync` the bytes are on disk
    before the rename, so that a power cut cannot leave an empty file.
    """
    part = beside(path, "part")
    try:
        yield part
        if sync:
            with part.open("rb") as stream:
                os.fsync(stream.fileno())
        part.replace(path)
    except OSError as error:
        if error.filename is None and error.errno is not None:  # as when a write finds the disk full
            raise OSError(error.errno, error.strerror, str(path)) from error
        raise
    finally:
        part.unlink(missing_ok=True)


def beside(path: Path, kind: str) -> Path:
    """The path of a hidden sibling of `path` for temporary work of this thread.

    Siblings that killed processes of this machine left behind are removed.
    """
    own = path.parent / f"{_stem(path, kind)}{os.getpid()}-{threading.get_native_id()}"
    remove_abandoned(path, kind)
    _remove(own)
    return own


def abandoned(path: Path, kind: str) -> list[Path]:
    """The siblings of `path` that killed processes of this machine made by `beside`."""
    stem = _stem(path, kind)
    siblings = path.parent.glob(f"{glob.escape(stem)}*")
    pid_of = {sibling: sibling.name.removeprefix(stem).partition("-")[0] for sibling in siblings}
    return [sibling for sibling, pid in pid_of.items() if pid.isdigit() and not _alive(int(pid))]


def remove_abandoned(path: Path, kind: str) -> None:
    """Remove `abandoned` siblings of `path`."""
    for left in abandoned(path, kind):
        _remove(left)


def _stem(path: Path, kind: str) -> str:
    return f".{path.name}.{kind}-{socket.gethostname()}-"


def _remove(path: Path) -> None:
    if path.is_dir():
        shutil.rmtree(path, ignore_errors=True)
    else:
        path.unlink(missing_ok=True)


def _alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        return True
    return True


def read_json(path: Path) -> Any:
    """The content of a JSON file; `ValueError`, with the reason, if it is not valid UTF-8 or JSON."""
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except RecursionError:
        raise ValueError("it is nested too deeply") from None


def sha256_file(path: Path, *, show: bool = False) -> str:
    """Hex sha256 of a file, read in pieces of 4 MiB; with `show` a bar where it takes more than a second."""
    digest = hashlib.sha256()
    size = path.stat().st_size
    with (
        path.open("rb") as stream,
        progress(f"hash {path.name}", total=size, unit="bytes", show=show, after_s=1.0) as bar,
    ):
        while piece := stream.read(1 << 22):
            digest.update(piece)
            bar.advance(len(piece))
    return digest.hexdigest()
