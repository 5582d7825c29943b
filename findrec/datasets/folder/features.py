"""Feature tables: one safetensors file for each modality, `[V+1, D]` fp16 with a presence mask.

Row 0 belongs to the padding item and is zero, like the rows of items without this modality. The table is
mapped into memory, so a batch reads only the rows of its distinct items.
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

from findrec.datasets.folder.manifest import FeatureEntry
from findrec.errors import FindRecError

_CHUNK = 8192  # rows per write
_LARGE = 1 << 28  # bytes; larger tables are kept on disk
_DTYPES = {"F16": np.dtype("<f2"), "BOOL": np.dtype("?")}


@dataclass(frozen=True)
class ModalRows:
    """Features of one modality for the distinct items of a batch; row k belongs to `batch.ids[k]`."""

    values: Tensor  # [U, M] float32; zeros where missing
    present: Tensor  # [U] bool; False for padding and for items without this modality
    known_index: Tensor | None = None  # [n] `present_index`, where it is known without waiting for a GPU

    @property
    def present_index(self) -> Tensor:
        """`[n]` int64, ascending: the rows that are present."""
        return self.present.nonzero().squeeze(1) if self.known_index is None else self.known_index


@dataclass(frozen=True)
class FeatureInput:
    """Features of one modality to write to a data folder."""

    modality: str
    values: NDArray[Any]  # [V+1, D], any float type; stored as fp16
    present: NDArray[np.bool_]  # [V+1]
    encoder: str  # name of the encoder
    weights_sha256: str = ""
    revision: str = ""  # of the encoder, if known


def write_feature(path: Path, feature: FeatureInput) -> bool:
    """Write one table in chunks of rows.

    Returns:
        Whether all present rows have norm 1, to the precision of fp16.

    Raises:
        FindRecError: If a present row is not finite or does not fit fp16.
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
    header += b" " * (-len(header) % 8)  # aligns the numbers in the mapped file
    normalised = bool(present.any())
    with path.open("wb") as stream:
        stream.write(len(header).to_bytes(8, "little") + header)
        for begin in range(0, rows, _CHUNK):
            chunk_present = present[begin : begin + _CHUNK]
            values = np.where(chunk_present[:, None], feature.values[begin : begin + _CHUNK], 0)
            with np.errstate(over="ignore"):  # checked below
                values = values.astype("<f2")
            if not np.isfinite(values).all():
                row = begin + int(np.flatnonzero(~np.isfinite(values).all(axis=1))[0])
                raise FindRecError(
                    f"features of modality {feature.modality!r} do not fit fp16 (first at item {row}): scale "
                    "them down"
                )
            stream.write(values.tobytes())
            norms = np.linalg.norm(values[chunk_present].astype(np.float32), axis=1)
            normalised &= bool(np.all(np.abs(norms - 1) < 2e-3))
        stream.write(present.tobytes())
        stream.flush()
        os.fsync(stream.fileno())  # must be on disk before the manifest that names it
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
    """Zeros `[rows, dim]`; a large table is mapped from an unnamed file in the folder `scratch`, if any."""
    if scratch is None or rows * dim * 2 < _LARGE:
        return np.zeros((rows, dim), dtype=np.float16)
    with tempfile.TemporaryFile(dir=scratch) as file:  # exists while it is mapped
        return np.memmap(file, np.float16, "w+", shape=(rows, dim))


def scatter_features(
    num_items: int,
    ids: NDArray[np.int64],
    values: NDArray[np.float16],
    present: NDArray[np.bool_],
    *,
    base: FeatureTable | None = None,
    scratch: Path | None = None,
) -> tuple[NDArray[np.float16], NDArray[np.bool_]]:
    """Build a table `[V+1, D]` and its mask `[V+1]` from `values` `[N, D]` of the items `ids` `[N]`.

    Other items have the features of `base` (a table of at most V items of the same encoder), or none. A large
    table is mapped from an unnamed file in the folder `scratch`.
    """
    if base is not None and present.any() and base.dim != values.shape[1]:
        raise FindRecError(
            f"the existing features of {base.modality!r} have width {base.dim}, new ones {values.shape[1]}: "
            "encode all of them again with one encoder"
        )
    table = blank_table(num_items + 1, values.shape[1] if base is None else base.dim, scratch)
    mask = np.zeros(num_items + 1, dtype=bool)
    if base is not None:
        table[: len(base)] = base.values
        mask[: len(base)] = base.present
        replaced = ids[ids < len(base)]
        table[replaced], mask[replaced] = 0, False
    if present.any():  # without any vector the width is 0
        table[ids[present]] = values[present]
    mask[ids[present]] = True
    return table, mask


def _tensors(path: Path) -> dict[str, NDArray[Any]]:
    """Map the tensors of a safetensors file (8-byte header length, JSON header, data) into memory."""
    size = path.stat().st_size
    with path.open("rb") as stream:
        length = int.from_bytes(stream.read(8), "little")
        if not 2 <= length <= min(size - 8, 1 << 20):
            raise ValueError("it has no safetensors header")
        header = json.loads(stream.read(length))
    if not isinstance(header, dict):
        raise ValueError("its header is not a mapping")
    tensors: dict[str, NDArray[Any]] = {}
    for name, entry in header.items():
        if name == "__metadata__":
            continue
        dtype, shape = _DTYPES[entry["dtype"]], tuple(int(n) for n in entry["shape"])
        begin, end = entry["data_offsets"]
        begin, end = 8 + length + begin, 8 + length + end
        if end - begin != int(np.prod(shape)) * dtype.itemsize or end > size:
            raise ValueError(f"tensor {name!r} does not fit the file")
        tensors[name] = np.memmap(path, dtype=dtype, mode="r", offset=begin, shape=shape)
    return tensors


class FeatureTable:
    """Features of one modality for all items.

    Attributes:
        values: `[V+1, D]` fp16, mapped: only rows that are indexed are read.
        present: `[V+1]` which items have this modality.
    """

    def __init__(self, path: Path, modality: str) -> None:
        self.modality = modality
        try:
            tensors = _tensors(path)
            self.values: NDArray[np.float16] = tensors["values"]
            self.present: NDArray[np.bool_] = np.asarray(tensors["present"])
            if self.values.dtype != _DTYPES["F16"] or self.present.dtype != _DTYPES["BOOL"]:
                raise ValueError("values are not F16, or present is not BOOL")
            if self.values.ndim != 2 or self.present.shape != self.values.shape[:1]:
                raise ValueError("values and present do not have a row for each item")
        except (OSError, ValueError, KeyError, TypeError, OverflowError, RecursionError) as error:
            reason = f"its header lacks {error}" if isinstance(error, KeyError) else error
            raise FindRecError(f"feature file {path} cannot be read: {reason}") from None
        self.dim = int(self.values.shape[1])

    def __len__(self) -> int:
        return int(self.values.shape[0])

    def rows(self, ids: Tensor) -> ModalRows:
        """Look up the features of `ids` `[U]` (item ids, 0 is padding), on the device of `ids`."""
        index = ids.detach().cpu().numpy()
        values = torch.from_numpy(self.values[index].astype(np.float32))
        present = torch.from_numpy(self.present[index])
        return ModalRows(values=values.to(ids.device), present=present.to(ids.device))

    def stored_rows(self, ids_n: Tensor) -> tuple[Tensor, Tensor]:
        """The features `[n, D]` of `ids_n` as they are stored, in fp16, and the mask `[n]`; on the CPU."""
        index = ids_n.numpy()
        return torch.from_numpy(self.values[index]), torch.from_numpy(self.present[index])

    @property
    def nbytes(self) -> int:
        """Size of the whole table."""
        return int(self.values.nbytes + self.present.nbytes)
