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
_MEMBER = re.compile(r"(\d{6,12})\.([a-z_]+)\.npy")
_REGULAR = (b"0", b"\0")


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

    Raises `FindRecError` for a file that is no flat tar of regular `.npy` members.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        with path.open("rb") as stream:
            self._map = mmap.mmap(stream.fileno(), 0, access=mmap.ACCESS_READ)
        self.samples: list[dict[str, NDArray[Any]]] = []
        self._index()

    def _refuse(self, why: str) -> FindRecError:
        return FindRecError(f"shard {self.path} cannot be read: {why}. Make the data folder again.")

    def _index(self) -> None:
        at, size = 0, len(self._map)
        keys: dict[str, int] = {}
        while at + BLOCK <= size:
            header = self._map[at : at + BLOCK]
            if header == bytes(BLOCK):
                return
            name = header[:100].rstrip(b"\0").decode("ascii", "replace")
            if header[156:157] not in _REGULAR or header[345:500].strip(b"\0"):
                raise self._refuse(f"member {name!r} is no plain file (links and folders are refused)")
            found = _MEMBER.fullmatch(name)
            if found is None:
                raise self._refuse(f"member {name!r} has a name that no sample has")
            try:
                length = int(header[124:136].rstrip(b"\0 "), 8)
            except ValueError:
                raise self._refuse(f"member {name!r} has no size") from None
            begin = at + BLOCK
            if begin + length > size:
                raise self._refuse(f"it ends inside member {name!r}")
            key, column = found.groups()
            if key not in keys:
                keys[key] = len(self.samples)
                self.samples.append({})
            self.samples[keys[key]][column] = self._array(begin, length, name)
            at = begin + -(-length // BLOCK) * BLOCK
        raise self._refuse("it has no end mark")

    def _array(self, begin: int, length: int, name: str) -> NDArray[Any]:
        head = io.BytesIO(self._map[begin : begin + min(length, 4096)])
        try:
            np.lib.format.read_magic(head)
            shape, _, dtype = np.lib.format.read_array_header_1_0(head)
        except ValueError as error:
            raise self._refuse(f"member {name!r} is no .npy array ({error})") from None
        if len(shape) != 1 or dtype.hasobject or head.tell() + shape[0] * dtype.itemsize != length:
            raise self._refuse(f"member {name!r} is no flat array of numbers")
        return np.frombuffer(self._map, dtype=dtype, count=shape[0], offset=begin + head.tell())
