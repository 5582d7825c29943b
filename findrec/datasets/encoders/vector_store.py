"""On-disk store of encoded vectors, so that an interrupted encoding run can resume.

A store is a folder of part files with keys and their vectors. A part is named by its sha256 and renamed into
place once complete: a truncated or altered part does not match its name and is encoded again. Keys are 64-bit
hashes of encoder and input, so a changed image or another encoder never matches old vectors (the probability
of a collision among ten million inputs is three in a million).
"""

from __future__ import annotations

import hashlib
import time
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from safetensors import SafetensorError
from safetensors.numpy import load, save

from findrec.datasets.folder.features import blank_table
from findrec.errors import FindRecError
from findrec.files import replacing

PART_ROWS = 4096  # vectors in a part, at most
PART_SECONDS = 15.0  # interval of writes: the work that a kill may lose
_SUFFIX = ".vectors"

Keys = NDArray[np.uint64]
Vectors = NDArray[np.float16]


def key_of(*parts: str) -> int:
    """64-bit hash of the strings that determine a vector; never 0."""
    digest = hashlib.blake2b(digest_size=8)
    for part in parts:
        data = part.encode("utf-8", "surrogateescape")  # file names may hold any bytes
        digest.update(len(data).to_bytes(8, "little") + data)
    return int.from_bytes(digest.digest(), "little") or 1


class VectorStore:
    """Vectors by key; on disk in `folder`, or only in memory if it is None."""

    def __init__(self, folder: Path | None = None) -> None:
        self._folder = folder
        self._parts: list[tuple[Keys, int, Vectors | Path]] = []  # keys, width, vectors or their file
        self._new: list[tuple[Keys, Vectors]] = []
        self._since = time.monotonic()
        for path in sorted(folder.glob(f"*{_SUFFIX}")) if folder is not None else []:
            if (part := _read_part(path)) is None:
                path.unlink()
                continue
            self._parts.append((part["keys"], part["values"].shape[1], path))

    def known(self) -> Keys:
        """All keys that have a vector."""
        every = [*(part[0] for part in self._parts), *(part[0] for part in self._new)]
        return np.concatenate([np.zeros(0, np.uint64), *every])

    def add(self, keys: Keys, values: Vectors) -> None:
        """Add `values` `[n, D]`; writes them to disk from time to time."""
        self._new.append((keys, values))
        rows = sum(len(keys) for keys, _ in self._new)
        if rows >= PART_ROWS or time.monotonic() - self._since >= PART_SECONDS:
            self.flush()

    def flush(self) -> None:
        """Write new vectors to disk."""
        if not self._new:
            return
        keys = np.concatenate([keys for keys, _ in self._new])
        values = np.concatenate([values for _, values in self._new])
        kept = values if self._folder is None else _write_part(self._folder, keys, values)
        self._parts.append((keys, values.shape[1], kept))
        self._new, self._since = [], time.monotonic()

    def take(self, keys: Keys) -> tuple[Vectors, NDArray[np.bool_]]:
        """Vectors `[N, D]` of `keys` `[N]`, zero where unknown, and a mask `[N]` of the known ones."""
        self.flush()
        order = np.argsort(keys, kind="stable")
        ordered = keys[order]
        matches = []
        for own, width, part in self._parts:  # parts of other encoders match no key
            first, last = np.searchsorted(ordered, own), np.searchsorted(ordered, own, side="right")
            if (last > first).any():
                matches.append((first, last, width, part))
        values = blank_table(len(keys), matches[0][2] if matches else 0, self._folder)
        present = np.zeros(len(keys), dtype=bool)
        for first, last, _, part in matches:
            rows = order[_ranges(first, last)]  # more than one row per key if `keys` has duplicates
            vectors = load(part.read_bytes())["values"] if isinstance(part, Path) else part
            values[rows] = np.repeat(vectors, last - first, axis=0)
            present[rows] = True
        return values, present


def _read_part(path: Path) -> dict[str, NDArray[Any]] | None:
    """The tensors of a part, or None if its sha256 does not match its name."""
    data = path.read_bytes()
    if hashlib.sha256(data).hexdigest() != path.name.removesuffix(_SUFFIX):
        return None
    try:
        part: dict[str, NDArray[Any]] = load(data)
    except SafetensorError:
        return None
    return part


def _write_part(folder: Path, keys: Keys, values: Vectors) -> Path:
    data = save({"keys": keys, "values": values})
    target = folder / f"{hashlib.sha256(data).hexdigest()}{_SUFFIX}"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with replacing(target, sync=True) as part:
            part.write_bytes(data)
    except OSError as error:
        raise FindRecError(
            f"cannot write vectors to {folder}: {error.strerror or error}. Free some space or change the "
            "folder's permissions; vectors already stored are reused by the next run."
        ) from error
    return target


def _ranges(first: NDArray[np.int64], last: NDArray[np.int64]) -> NDArray[np.int64]:
    """`first[0], ..., last[0] - 1, first[1], ...` in one array."""
    length = last - first
    begin = np.repeat(first - np.concatenate([[0], np.cumsum(length)[:-1]]), length)
    return begin + np.arange(int(length.sum()))
