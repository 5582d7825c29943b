"""Modal features of items, looked up by id."""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from typing import Protocol

import torch
from torch import Tensor

from findrec.datasets.folder.data_folder import DataFolder
from findrec.datasets.folder.features import FeatureTable, ModalRows
from findrec.devices import free_bytes, is_cpu

GPU_SHARE = 0.25  # of the free memory of a GPU, for feature tables
_COPIED_ROWS = 1 << 16  # copied to a GPU at a time


def fit_gpu(table_bytes: int, free: int, share: float = GPU_SHARE) -> bool:
    """Whether feature tables are kept on a GPU with `free` bytes of unused memory."""
    return table_bytes <= share * free


class ItemFeatures(Protocol):
    """Source of item features for training."""

    def features(self, ids_n: Tensor) -> Mapping[str, ModalRows]:
        """One `ModalRows` for each modality, row k for item `ids_n[k]`, on the device of `ids_n`."""

    def all_features(self, device: torch.device | str, part: range | None = None) -> Mapping[str, ModalRows]:
        """Features of items 0..V (0 is padding), or of the ids in `part`."""


class Catalogue:
    """Item features of a data folder in the modalities that a model uses (`ItemFeatures`).

    Rows are read from the mapped files. With `keep_on`, the tables are copied to a GPU, so that it looks up
    rows itself.
    """

    def __init__(
        self, folder: DataFolder, modalities: Sequence[str], *, noise: float = 0.0, seed: int = 0
    ) -> None:
        """`noise` is the share of items whose features are permuted by `seed`, to train on wrong content."""
        self.num_items = folder.num_items
        self._source = _permuted(folder.num_items, noise, seed)  # [V+1] item whose features each item has
        self._dropped: dict[str, Tensor] = {}  # [V+1] by modality: items marked as missing
        self.modalities = list(modalities)
        self._folder = folder
        self._cached: tuple[range, dict[str, ModalRows]] | None = None
        self._on_gpu: dict[str, tuple[Tensor, Tensor]] = {}  # by modality: values [V+1, D] and mask [V+1]

    def altered(self, *, noise: float = 0.0, missing: float = 0.0, seed: int = 0) -> Catalogue:
        """The same catalogue with permuted or missing features, to test the robustness of a trained model.

        The features of a share `noise` of the items are permuted among each other; in each modality a share
        `missing` of the items is marked as missing. Items drawn for a share are also drawn for any larger
        one. With both 0 the features are unchanged.
        """
        other = copy.copy(self)
        other._source = self._source[_permuted(self.num_items, noise, seed)]
        other._dropped = dict(self._dropped)
        other._cached = None
        other._on_gpu = {}
        for number, name in enumerate(self.modalities if missing else []):
            mask = torch.zeros(self.num_items + 1, dtype=torch.bool)
            mask[_drawn(self.num_items, missing, seed + 7919 * (1 + number))] = True
            other._dropped[name] = mask | self._dropped.get(name, torch.zeros_like(mask))
        return other

    def keep_on(self, device: torch.device | str, share: float = GPU_SHARE) -> bool:
        """Copy the tables to a GPU if they take at most `share` of its free memory; returns whether."""
        tables = {name: self._folder.feature(name) for name in self.modalities}
        if is_cpu(device) or not fit_gpu(self.nbytes, free_bytes(device), share):
            return False
        # Assigned at once: a loader's thread may be asking whether the tables are there.
        self._on_gpu = {name: self._copied(name, table, device) for name, table in tables.items()}
        return True

    def _copied(self, name: str, table: FeatureTable, device: torch.device | str) -> tuple[Tensor, Tensor]:
        """The stored features of all items on a device."""
        rows = self.num_items + 1
        values = torch.empty(rows, table.dim, dtype=torch.float16, device=device)
        present = torch.empty(rows, dtype=torch.bool, device=device)
        for lo in range(0, rows, _COPIED_ROWS):
            part = slice(lo, min(lo + _COPIED_ROWS, rows))
            some_values, some_present = self.stored_rows(name, torch.arange(part.start, part.stop))
            values[part] = some_values.to(device)
            present[part] = some_present.to(device)
        return values, present

    def stored_rows(self, name: str, ids_n: Tensor) -> tuple[Tensor, Tensor]:
        """Features `[n, D]` in fp16 and mask `[n]` of a modality, read from its file; on the CPU."""
        values, present = self._folder.feature(name).stored_rows(self._source[ids_n])
        if (dropped := self._dropped.get(name)) is not None:
            kept_n = ~dropped[ids_n]
            values, present = values * kept_n[:, None], present & kept_n
        return values, present

    def present_index(self, name: str, ids_n: Tensor) -> Tensor:
        """Indices of those of `ids_n` that have a modality; on the CPU."""
        present = torch.from_numpy(self._folder.feature(name).present[self._source[ids_n].numpy()])
        if (dropped := self._dropped.get(name)) is not None:
            present = present & ~dropped[ids_n]
        return present.nonzero().squeeze(1)

    @property
    def nbytes(self) -> int:
        """Size of the feature tables."""
        return sum(self._folder.feature(name).nbytes for name in self.modalities)

    @property
    def is_on_gpu(self) -> bool:
        """Whether `keep_on` has copied the tables."""
        return bool(self._on_gpu)

    def features(self, ids_n: Tensor) -> dict[str, ModalRows]:
        """See `ItemFeatures`."""
        if self._on_gpu and not is_cpu(ids_n.device):
            return {
                name: ModalRows(values[ids_n].float(), present[ids_n])
                for name, (values, present) in self._on_gpu.items()
            }
        ids_n, device = ids_n.cpu(), ids_n.device
        features = {}
        for name in self.modalities:
            rows = self._folder.feature(name).rows(self._source[ids_n])
            if (dropped := self._dropped.get(name)) is not None:
                kept_n = ~dropped[ids_n]
                rows = ModalRows(rows.values * kept_n[:, None], rows.present & kept_n)
            features[name] = ModalRows(rows.values.to(device), rows.present.to(device))
        return features

    def all_features(self, device: torch.device | str, part: range | None = None) -> dict[str, ModalRows]:
        """See `ItemFeatures`; the last requested part is cached in memory, as float32."""
        part = range(self.num_items + 1) if part is None else part
        if self._cached is None or self._cached[0] != part:
            self._cached = part, self.features(torch.arange(part.start, part.stop, device=device))
        return self._cached[1]


def _drawn(num_items: int, share: float, seed: int) -> Tensor:
    """`[round(share * V)]` item ids: the first ones of a random order given by the seed."""
    order = torch.randperm(num_items, generator=torch.Generator().manual_seed(seed))
    return 1 + order[: round(share * num_items)]


def _permuted(num_items: int, share: float, seed: int) -> Tensor:
    """`[V+1]` ids 0..V, with the drawn ones rotated by one position in the order of drawing."""
    source = torch.arange(num_items + 1)
    drawn = _drawn(num_items, share, seed)
    source[drawn] = drawn.roll(1)
    return source
