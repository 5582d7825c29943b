"""Packed shards: ordinary WebDataset tars whose samples each hold the histories of many users.

A sample `000012` is a few `.npy` members (`000012.item.npy`, `000012.timestamp.npy`, `000012.offset.npy`):
one flat array a column and the offsets that cut it into users. The stock `webdataset` library reads them;
our own reader maps the file into memory and finds any user without reading the rest.
"""

from __future__ import annotations

import io
import mmap
import re
import tarfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from findrec.errors import FindRecError

BLOCK = 512  # a tar's unit: one header, and the padding of every member
# Exactly these types are read: what is computed with them elsewhere relies on it.
DTYPES = {"item": "<i4", "timestamp": "<i8", "event": "<i2", "value": "<f4", "offset": "<i8"}
_MEMBER = re.compile(r"(\d{6,12})\.([a-z_]+)\.npy")
_REGULAR = (b"0", b"\0")
_OCTAL = re.compile(rb" *([0-7]{1,12})[ \0]*")
# What numpy writes as version 1.0 of a flat array. Taken apart here: numpy would evaluate any Python literal.
_NPY = re.compile(
    rb"\x93NUMPY\x01\x00(..)\{'descr': '([<|][a-zA-Z]\d{1,2})', 'fortran_order': False, "
    rb"'shape': \((\d{1,18}),\), \} *\n",
    re.DOTALL,
)


def append_sample(tar: tarfile.TarFile, key: int, columns: Mapping[str, NDArray[Any]]) -> None:
    """Write one sample. Headers carry no owner and no time, so the bytes depend on the arrays alone."""
    for name, values in columns.items():
        buffer = io.BytesIO()
        np.lib.format.write_array(buffer, np.ascontiguousarray(values), version=(1, 0), allow_pickle=False)
        info = tarfile.TarInfo(f"{key:06d}.{name}.npy")
        info.size = buffer.tell()
        info.mode = 0o644
        buffer.seek(0)
        tar.addfile(info, buffer)


def open_for_writing(path: Path) -> tarfile.TarFile:
    """A tar in the plain `ustar` format (every header is exactly one block)."""
    return tarfile.open(path, "w", format=tarfile.USTAR_FORMAT)


class ShardReader:
    """Read-only view of one shard. Arrays are views of the mapped file: nothing is copied or unpickled.

    `columns` names those that every sample must have, no more and no fewer (default: those of the first).
    Raises `FindRecError`, which names the file and the member and ends with `mend`, for a file that is no
    flat tar of regular `.npy` members.
    """

    def __init__(
        self,
        path: Path,
        columns: Mapping[str, str] | None = None,
        *,
        mend: str = "Make the data folder again.",
    ) -> None:
        self.path = path
        self._mend = mend
        try:
            with path.open("rb") as stream:
                self._map = mmap.mmap(stream.fileno(), 0, access=mmap.ACCESS_READ)
        except (OSError, ValueError) as error:  # an empty file cannot be mapped
            raise self.refuse(str(error)) from None
        self.samples: list[dict[str, NDArray[Any]]] = []
        self.keys: list[str] = []
        self._index()
        wanted = set(columns) if columns is not None else set(self.samples[0]) if self.samples else set()
        for key, sample in zip(self.keys, self.samples, strict=True):
            if set(sample) != wanted:
                odd = ", ".join(sorted(set(sample) ^ wanted))
                raise self.refuse(f"sample {key} lacks, or alone has, the column {odd}")

    def refuse(self, why: str) -> FindRecError:
        """The error that says why this file cannot be used."""
        return FindRecError(f"shard {self.path} cannot be read: {why}. {self._mend}")

    def _index(self) -> None:
        at, size = 0, len(self._map)
        keys: dict[str, int] = {}
        while at + BLOCK <= size:
            header = self._map[at : at + BLOCK]
            if header == bytes(BLOCK):
                return
            name = header[:100].rstrip(b"\0").decode("ascii", "replace")
            stated = _OCTAL.fullmatch(header[148:156])
            if stated is None or int(stated[1], 8) != sum(header) - sum(header[148:156]) + 8 * ord(" "):
                raise self.refuse(f"the header of member {name!r} at byte {at} does not fit its check sum")
            if header[156:157] not in _REGULAR or header[345:500].strip(b"\0"):
                raise self.refuse(f"member {name!r} is no plain file (links and folders are refused)")
            found = _MEMBER.fullmatch(name)
            if found is None:
                raise self.refuse(f"member {name!r} has a name that no sample has")
            length_text = _OCTAL.fullmatch(header[124:136])
            if length_text is None:  # sizes above 8 GiB are written in another way
                raise self.refuse(f"member {name!r} has no size that a shard's member may have")
            length = int(length_text[1], 8)
            begin = at + BLOCK
            if begin + length > size:
                raise self.refuse(
                    f"member {name!r} says it has {length:,} bytes, {size - begin:,} are left (cut short?)"
                )
            key, column = found.groups()
            if key not in keys:
                keys[key] = len(self.samples)
                self.samples.append({})
                self.keys.append(key)
            if column in self.samples[keys[key]]:
                raise self.refuse(f"member {name!r} occurs twice")
            self.samples[keys[key]][column] = self._array(begin, length, name, column)
            at = begin + -(-length // BLOCK) * BLOCK
        raise self.refuse("it has no end mark (a file cut short?)")

    def _array(self, begin: int, length: int, name: str, column: str) -> NDArray[Any]:
        found = _NPY.match(self._map[begin : begin + min(length, 4096)])
        if found is None or int.from_bytes(found[1], "little") != found.end() - 10:
            raise self.refuse(f"member {name!r} is no flat .npy array of numbers (pickles are refused)")
        dtype, count = found[2].decode(), int(found[3])
        if column not in DTYPES:
            raise self.refuse(f"member {name!r} is of a column that no sample has")
        if dtype != DTYPES[column]:
            raise self.refuse(f"member {name!r} has numbers of type {dtype}, {DTYPES[column]} is right")
        if found.end() + count * np.dtype(dtype).itemsize != length:
            raise self.refuse(f"member {name!r} is not as long as its array of {count:,} numbers")
        return np.frombuffer(self._map, dtype=dtype, count=count, offset=begin + found.end())
