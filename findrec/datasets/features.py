"""Feature tables: one safetensors file for each modality, `[V+1, D]` fp16 with a presence mask.

Row 0 belongs to the padding item and is zero, as is every row of an item without this modality. The
table is mapped into memory, so a batch touches only the rows of its distinct items.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from safetensors.numpy import save_file
from torch import Tensor

from findrec.datasets.batch import ModalRows
from findrec.errors import FindRecError

_DTYPES = {"F16": np.dtype("<f2"), "BOOL": np.dtype("?")}


@dataclass(frozen=True)
class FeatureInput:
    """Features on their way into a data folder."""

    modality: str
    values: NDArray[Any]  # [V+1, D], any float type; stored as fp16
    present: NDArray[np.bool_]  # [V+1]
    encoder: str  # what made them
    weights_sha256: str = ""


def write_feature(path: Path, feature: FeatureInput) -> bool:
    """Write one table; returns whether all present rows have norm 1 (to fp16's precision)."""
    present = feature.present.copy()
    present[0] = False
    with np.errstate(over="ignore"):  # checked below
        values = np.where(present[:, None], feature.values, 0).astype(np.float16)
    if not np.isfinite(values).all():
        raise FindRecError(
            f"features of modality {feature.modality!r} do not fit fp16: scale them down first"
        )
    save_file({"present": present, "values": values}, str(path))
    path.chmod(0o644)  # safetensors makes files that only their owner reads
    norms = np.linalg.norm(values[present].astype(np.float32), axis=1)
    return bool(len(norms) and np.all(np.abs(norms - 1) < 2e-3))


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
