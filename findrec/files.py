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
    finally:
        part.unlink(missing_ok=True)


def beside(path: Path, kind: str) -> Path:
    """The path of a hidden sibling of `path` for temporary work of this thread.

    Siblings that killed processes of this machine left behind are removed.
    """
    stem = f".{path.name}.{kind}-{socket.gethostname()}-"
    own = path.parent / f"{stem}{os.getpid()}-{threading.get_native_id()}"
    for left in path.parent.glob(f"{glob.escape(stem)}*"):
        pid = left.name.removeprefix(stem).partition("-")[0]
        if left == own or (pid.isdigit() and not _alive(int(pid))):
            if left.is_dir():
                shutil.rmtree(left, ignore_errors=True)
            else:
                left.unlink(missing_ok=True)
    return own


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
