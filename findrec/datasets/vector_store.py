"""Vectors that are ready while an encoder is still at work, so that a killed run goes on where it was.

A store is a folder of parts, each some keys and their vectors. A part is named by the sha256 of its bytes and
appears by a rename once it is whole on disk: one that was cut short or altered does not have its name, and is
made again. Keys are 64-bit hashes of encoder and input, so a changed picture or another encoder never finds
old vectors (ten million inputs share a hash with a chance of three in a million).
"""

from __future__ import annotations

import hashlib
import os
import time
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from safetensors import SafetensorError
from safetensors.numpy import load, save

from findrec.datasets.features import blank_table
from findrec.errors import FindRecError

PART_ROWS = 4096  # vectors in a part, at most
PART_SECONDS = 15.0  # and what a kill may cost
_SUFFIX = ".vectors"

Keys = NDArray[np.uint64]
Vectors = NDArray[np.float16]


def key_of(*parts: str) -> int:
    """64-bit key of what decides a vector; never 0."""
    digest = hashlib.blake2b(digest_size=8)
    for part in parts:
        data = part.encode("utf-8", "surrogateescape")  # file names may hold any bytes
        digest.update(len(data).to_bytes(8, "little") + data)
    return int.from_bytes(digest.digest(), "little") or 1


class VectorStore:
    """Vectors by key; on disk in `folder`, or in memory alone where it is None."""

    def __init__(self, folder: Path | None = None) -> None:
        self._folder = folder
        self._parts: list[tuple[Keys, int, Vectors | Path]] = []  # keys, width, vectors or where they are
        self._new: list[tuple[Keys, Vectors]] = []
        self._since = time.monotonic()
        for path in sorted(folder.glob(f"*{_SUFFIX}")) if folder is not None else []:
            if (part := _whole(path)) is None:
                path.unlink()
                continue
            self._parts.append((part["keys"], part["values"].shape[1], path))

    def known(self) -> Keys:
        """All keys that have a vector."""
        every = [*(part[0] for part in self._parts), *(part[0] for part in self._new)]
        return np.concatenate([np.zeros(0, np.uint64), *every])

    def add(self, keys: Keys, values: Vectors) -> None:
        """Take in `values` `[n, D]`; from time to time what is there is made safe."""
        self._new.append((keys, values))
        rows = sum(len(keys) for keys, _ in self._new)
        if rows >= PART_ROWS or time.monotonic() - self._since >= PART_SECONDS:
            self.flush()

    def flush(self) -> None:
        """Write what is not on disk yet."""
        if not self._new:
            return
        keys = np.concatenate([keys for keys, _ in self._new])
        values = np.concatenate([values for _, values in self._new])
        kept = values if self._folder is None else _write_part(self._folder, keys, values)
        self._parts.append((keys, values.shape[1], kept))
        self._new, self._since = [], time.monotonic()

    def take(self, keys: Keys) -> tuple[Vectors, NDArray[np.bool_]]:
        """Vectors of `keys` `[N]` as `[N, D]` and which were there; the others are zero."""
        self.flush()
        order = np.argsort(keys, kind="stable")
        ordered = keys[order]
        found = []
        for own, width, part in self._parts:  # other encoders' parts may lie there: no key of theirs is asked
            first, last = np.searchsorted(ordered, own), np.searchsorted(ordered, own, side="right")
            if (last > first).any():
                found.append((first, last, width, part))
        values = blank_table(len(keys), found[0][2] if found else 0, self._folder)
        there = np.zeros(len(keys), dtype=bool)
        for first, last, _, part in found:
            rows = order[_ranges(first, last)]  # several where `keys` holds a key more than once
            vectors = load(part.read_bytes())["values"] if isinstance(part, Path) else part
            values[rows] = np.repeat(vectors, last - first, axis=0)
            there[rows] = True
        return values, there


def _whole(path: Path) -> dict[str, NDArray[Any]] | None:
    """A part whose bytes are those that it is named after, or None."""
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
        part = folder / f".part-{os.getpid()}"
        with part.open("wb") as stream:
            stream.write(data)
            stream.flush()
            os.fsync(stream.fileno())  # a rename may reach the disk before the bytes do
        part.rename(target)
    except OSError as error:
        raise FindRecError(
            f"cannot keep vectors in {folder}: {error.strerror or error}. Free some space or change the "
            "folder's rights; what is there already is used when you start again."
        ) from error
    return target


def _ranges(first: NDArray[np.int64], last: NDArray[np.int64]) -> NDArray[np.int64]:
    """`first[0], ..., last[0] - 1, first[1], ...` in one array."""
    length = last - first
    begin = np.repeat(first - np.concatenate([[0], np.cumsum(length)[:-1]]), length)
    return begin + np.arange(int(length.sum()))
