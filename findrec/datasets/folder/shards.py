"""Packed shards: ordinary WebDataset tars in which each sample holds the histories of many users.

A sample `000012` consists of `.npy` members (`000012.item.npy`, `000012.timestamp.npy`, `000012.offset.npy`):
a flat array per column, and the offsets of the users. The `webdataset` library writes and reads them; our own
reader maps the file into memory and gives random access to users.
"""

from __future__ import annotations

import mmap
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from findrec.errors import FindRecError

BLOCK = 512  # size of a tar header, and alignment of the members
# Only these types are accepted; code that processes the arrays relies on it.
DTYPES = {"item": "<i4", "timestamp": "<i8", "event": "<i2", "value": "<f4", "offset": "<i8"}
_MEMBER = re.compile(r"(\d{6,12})\.([a-z_]+)\.npy")
_REGULAR = (b"0", b"\0")
_OCTAL = re.compile(rb" *([0-7]{1,12})[ \0]*")
# Header of a flat array in .npy version 1.0, parsed here because numpy would evaluate any Python literal.
_NPY = re.compile(
    rb"\x93NUMPY\x01\x00(..)\{'descr': '([<|][a-zA-Z]\d{1,2})', 'fortran_order': False, "
    rb"'shape': \((\d{1,18}),\), \} *\n",
    re.DOTALL,
)


class ShardReader:
    """Read-only access to one shard. Arrays are views of the mapped file: nothing is copied or unpickled."""

    def __init__(
        self,
        path: Path,
        columns: Mapping[str, str] | None = None,
        *,
        hint: str = "Make the data folder again.",
    ) -> None:
        """Map and index the file; `FindRecError` if it is not a flat tar of regular `.npy` members.

        Every sample must have exactly the given columns, by default those of the first one. Error messages
        end with `hint`.
        """
        self.path = path
        self._hint = hint
        try:
            with path.open("rb") as stream:
                self._map = mmap.mmap(stream.fileno(), 0, access=mmap.ACCESS_READ)
        except (OSError, ValueError) as error:  # an empty file cannot be mapped
            raise self.error(str(error)) from None
        self.samples: list[dict[str, NDArray[Any]]] = []
        self.keys: list[str] = []
        self._index()
        expected = set(columns) if columns is not None else set(self.samples[0]) if self.samples else set()
        for key, sample in zip(self.keys, self.samples, strict=True):
            if set(sample) != expected:
                differing = ", ".join(sorted(set(sample) ^ expected))
                raise self.error(f"sample {key} has missing or unexpected columns: {differing}")

    def error(self, reason: str) -> FindRecError:
        """The error for an invalid file."""
        return FindRecError(f"shard {self.path} cannot be read: {reason}. {self._hint}")

    def _index(self) -> None:
        position, size = 0, len(self._map)
        keys: dict[str, int] = {}
        while position + BLOCK <= size:
            header = self._map[position : position + BLOCK]
            if header == bytes(BLOCK):
                return
            name = header[:100].rstrip(b"\0").decode("ascii", "replace")
            checksum = _OCTAL.fullmatch(header[148:156])
            if checksum is None or int(checksum[1], 8) != sum(header) - sum(header[148:156]) + 8 * ord(" "):
                raise self.error(f"the header of member {name!r} at byte {position} has a wrong checksum")
            if header[156:157] not in _REGULAR or header[345:500].strip(b"\0"):
                raise self.error(f"member {name!r} is not a regular file (links and folders are rejected)")
            match = _MEMBER.fullmatch(name)
            if match is None:
                raise self.error(f"member {name!r} does not have the name of a sample's column")
            octal_length = _OCTAL.fullmatch(header[124:136])
            if octal_length is None:  # sizes above 8 GiB are not written in octal
                raise self.error(f"member {name!r} has an invalid size")
            length = int(octal_length[1], 8)
            begin = position + BLOCK
            if begin + length > size:
                raise self.error(
                    f"member {name!r} should have {length:,} bytes, {size - begin:,} are left (truncated?)"
                )
            key, column = match.groups()
            if key not in keys:
                keys[key] = len(self.samples)
                self.samples.append({})
                self.keys.append(key)
            if column in self.samples[keys[key]]:
                raise self.error(f"member {name!r} occurs twice")
            self.samples[keys[key]][column] = self._array(begin, length, name, column)
            position = begin + -(-length // BLOCK) * BLOCK
        raise self.error("it has no end-of-archive marker (truncated?)")

    def _array(self, begin: int, length: int, name: str, column: str) -> NDArray[Any]:
        match = _NPY.match(self._map[begin : begin + min(length, 4096)])
        if match is None or int.from_bytes(match[1], "little") != match.end() - 10:
            raise self.error(f"member {name!r} is not a flat .npy array of numbers (pickles are rejected)")
        dtype, count = match[2].decode(), int(match[3])
        if column not in DTYPES:
            raise self.error(f"member {name!r} is an unknown column")
        if dtype != DTYPES[column]:
            raise self.error(f"member {name!r} has dtype {dtype} instead of {DTYPES[column]}")
        if match.end() + count * np.dtype(dtype).itemsize != length:
            raise self.error(f"member {name!r} does not have the length of its array of {count:,} numbers")
        return np.frombuffer(self._map, dtype=dtype, count=count, offset=begin + match.end())
