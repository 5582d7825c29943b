"""Modal features of items, looked up by id."""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from typing import Protocol

import torch
from torch import Tensor

from findrec.datasets.folder.data_folder import DataFolder
from findrec.datasets.folder.features import ModalRows


class ItemFeatures(Protocol):
    """Source of item features for training."""

    def features(self, ids_n: Tensor) -> Mapping[str, ModalRows]:
        """One `ModalRows` for each modality, row k for item `ids_n[k]`, on the device of `ids_n`."""

    def all_features(self, device: torch.device | str, part: range | None = None) -> Mapping[str, ModalRows]:
        """Features of items 0..V (0 is padding), or of the ids in `part`."""


class Catalogue:
    """Item features of a data folder in the modalities that a model uses (`ItemFeatures`)."""

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
        for number, name in enumerate(self.modalities if missing else []):
            mask = torch.zeros(self.num_items + 1, dtype=torch.bool)
            mask[_drawn(self.num_items, missing, seed + 7919 * (1 + number))] = True
            other._dropped[name] = mask | self._dropped.get(name, torch.zeros_like(mask))
        return other

    def features(self, ids_n: Tensor) -> dict[str, ModalRows]:
        """See `ItemFeatures`."""
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
