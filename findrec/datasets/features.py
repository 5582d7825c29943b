"""Feature tables: one safetensors file for each modality, `[V+1, D]` fp16 with a presence mask.

Row 0 belongs to the padding item and is zero, as is every row of an item without this modality. The
table is mapped into memory, so a batch touches only the rows of its distinct items.
"""

from __future__ import annotations

import json
import os
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from findrec.datasets.batch import ModalRows
from findrec.datasets.manifest import FeatureEntry
from findrec.errors import FindRecError

_CHUNK = 8192  # rows written together
_LARGE = 1 << 28  # bytes of a table that is better kept on disk
_DTYPES = {"F16": np.dtype("<f2"), "BOOL": np.dtype("?")}


@dataclass(frozen=True)
class FeatureInput:
    """Features on their way into a data folder."""

    modality: str
    values: NDArray[Any]  # [V+1, D], any float type; stored as fp16
    present: NDArray[np.bool_]  # [V+1]
    encoder: str  # what made them
    weights_sha256: str = ""
    revision: str = ""  # of the encoder, where it has any


def write_feature(path: Path, feature: FeatureInput) -> bool:
    """Write one table, some rows at a time; returns whether all present rows have norm 1 (to fp16's
    precision). Raises `FindRecError` where a present row is not finite or does not fit fp16.
    """
    present = feature.present.copy()
    present[0] = False
    rows, dim = feature.values.shape
    size = rows * dim * 2
    header = json.dumps(
        {
            "values": {"dtype": "F16", "shape": [rows, dim], "data_offsets": [0, size]},
            "present": {"dtype": "BOOL", "shape": [rows], "data_offsets": [size, size + rows]},
        },
        separators=(",", ":"),
    ).encode()
    header += b" " * (-len(header) % 8)  # so that the numbers are aligned when the file is mapped
    normalised = bool(present.any())
    with path.open("wb") as stream:
        stream.write(len(header).to_bytes(8, "little") + header)
        for begin in range(0, rows, _CHUNK):
            there = present[begin : begin + _CHUNK]
            with np.errstate(over="ignore"):  # checked below
                values = np.where(there[:, None], feature.values[begin : begin + _CHUNK], 0).astype("<f2")
            if not np.isfinite(values).all():
                row = begin + int(np.flatnonzero(~np.isfinite(values).all(axis=1))[0])
                raise FindRecError(
                    f"features of modality {feature.modality!r} do not fit fp16 (first at item {row}): scale "
                    "them down first"
                )
            stream.write(values.tobytes())
            norms = np.linalg.norm(values[there].astype(np.float32), axis=1)
            normalised &= bool(np.all(np.abs(norms - 1) < 2e-3))
        stream.write(present.tobytes())
        stream.flush()
        os.fsync(stream.fileno())  # the manifest that names it must not reach the disk first
    return normalised


def store_feature(folder: Path, feature: FeatureInput, file: str) -> FeatureEntry:
    """Write one table to `folder / file` and return its entry for the manifest."""
    (folder / file).parent.mkdir(exist_ok=True)
    normalised = write_feature(folder / file, feature)
    return FeatureEntry(
        modality=feature.modality,
        file=file,
        dim=feature.values.shape[1],
        encoder=feature.encoder,
        weights_sha256=feature.weights_sha256,
        revision=feature.revision,
        normalised=normalised,
        missing=int((~feature.present[1:]).sum()),
    )


def blank_table(rows: int, dim: int, scratch: Path | None) -> NDArray[np.float16]:
    """Zeros `[rows, dim]`; what may not fit memory is a nameless file in the folder `scratch`."""
    if scratch is None or rows * dim * 2 < _LARGE:
        return np.zeros((rows, dim), dtype=np.float16)
    with tempfile.TemporaryFile(dir=scratch) as file:  # stays as long as it is mapped
        return np.memmap(file, np.float16, "w+", shape=(rows, dim))


def spread(
    num_items: int,
    ids: NDArray[np.int64],
    values: NDArray[np.float16],
    present: NDArray[np.bool_],
    *,
    base: FeatureTable | None = None,
    scratch: Path | None = None,
) -> tuple[NDArray[np.float16], NDArray[np.bool_]]:
    """A whole table `[V+1, D]` and its mask from `values` `[N, D]` of the items `ids` `[N]`. The other rows
    are those of `base` (a table of fewer items, or as many, made by the same encoder), or missing. A large
    table is mapped from a nameless file in the folder `scratch`.

    Raises `FindRecError` where the widths differ.
    """
    if base is not None and present.any() and base.dim != values.shape[1]:
        raise FindRecError(
            f"the features of {base.modality!r} there are {base.dim} wide, the new ones {values.shape[1]}: "
            "make all of them anew, with one encoder"
        )
    table = blank_table(num_items + 1, values.shape[1] if base is None else base.dim, scratch)
    mask = np.zeros(num_items + 1, dtype=bool)
    if base is not None:
        table[: len(base)] = base.values
        mask[: len(base)] = base.present
        anew = ids[ids < len(base)]
        table[anew], mask[anew] = 0, False
    if present.any():  # nothing has a width of 0
        table[ids[present]] = values[present]
    mask[ids[present]] = True
    return table, mask


def _tensors(path: Path) -> dict[str, NDArray[Any]]:
    """The tensors of a safetensors file as memory maps (the format: 8-byte length, JSON, raw data)."""
    size = path.stat().st_size
    with path.open("rb") as stream:
        length = int.from_bytes(stream.read(8), "little")
        if not 2 <= length <= min(size - 8, 1 << 20):
            raise ValueError("no safetensors header")
        header = json.loads(stream.read(length))
    found: dict[str, NDArray[Any]] = {}
    for name, entry in header.items():
        if name == "__metadata__":
            continue
        dtype, shape = _DTYPES[entry["dtype"]], tuple(int(n) for n in entry["shape"])
        begin, end = entry["data_offsets"]
        begin, end = 8 + length + begin, 8 + length + end
        if end - begin != int(np.prod(shape)) * dtype.itemsize or end > size:
            raise ValueError(f"tensor {name!r} does not fit the file")
        found[name] = np.memmap(path, dtype=dtype, mode="r", offset=begin, shape=shape)
    return found


class FeatureTable:
    """One modality's features for all items, looked up by item id."""

    def __init__(self, path: Path, modality: str) -> None:
        self.modality = modality
        try:
            tensors = _tensors(path)
            self._values = tensors["values"]
            self._present: NDArray[np.bool_] = np.asarray(tensors["present"])
            if self._values.ndim != 2 or self._present.shape != self._values.shape[:1]:
                raise ValueError("values are no table with a row for each item and its mask")
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise FindRecError(f"feature file {path} cannot be read: {error}") from None
        self.dim = int(self._values.shape[1])

    def __len__(self) -> int:
        return int(self._values.shape[0])

    @property
    def values(self) -> NDArray[np.float16]:
        """`[V+1, D]` the stored rows, mapped: only what is indexed is read."""
        return self._values

    @property
    def present(self) -> NDArray[np.bool_]:
        """`[V+1]` which items have this modality."""
        return self._present

    def rows(self, ids: Tensor) -> ModalRows:
        """Features of `ids` `[U]` (item ids, 0 is padding) on the device of `ids`."""
        where = ids.detach().cpu().numpy()
        values = torch.from_numpy(self._values[where].astype(np.float32))
        present = torch.from_numpy(self._present[where])
        return ModalRows(values=values.to(ids.device), present=present.to(ids.device))
