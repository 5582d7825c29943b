"""Modal features of items, looked up by id: for a batch's items and for those a loss ranks."""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from typing import Protocol

import torch
from torch import Tensor

from findrec.datasets.batch import ModalRows
from findrec.datasets.folder import DataFolder


class ItemFeatures(Protocol):
    """Where training finds the features of items."""

    def features(self, ids_n: Tensor) -> Mapping[str, ModalRows]:
        """One `ModalRows` for each modality, row k for item `ids_n[k]`, on the device of `ids_n`."""

    def all_features(self, device: torch.device | str, part: range | None = None) -> Mapping[str, ModalRows]:
        """Those of items 0..V (0 is padding), or of a `part` of them."""


class Catalogue:
    """Features of the items of a data folder, in the modalities a model is given (`ItemFeatures`)."""

    def __init__(
        self, folder: DataFolder, modalities: Sequence[str], *, noise: float = 0.0, seed: int = 0
    ) -> None:
        """With `noise` that share of the items, drawn by `seed`, swap their features among themselves: what a
        model makes of wrong content.
        """
        self.num_items = folder.num_items
        self._source = _swapped(folder.num_items, noise, seed)  # whose features each item has
        self._dropped: dict[str, Tensor] = {}  # [V + 1] by modality: items that are shown without
        self.modalities = list(modalities)
        self._folder = folder
        self._kept: tuple[range, dict[str, ModalRows]] | None = None

    def altered(self, *, noise: float = 0.0, missing: float = 0.0, seed: int = 0) -> Catalogue:
        """The same catalogue with wrong or less content, to see what a trained model makes of it.

        A share `noise` of the items swap their features among themselves; of each modality a share `missing`
        of the items is marked as without it. What is drawn for a share is part of what is drawn for a larger
        one. With both 0 nothing differs.
        """
        other = copy.copy(self)
        other._source = self._source[_swapped(self.num_items, noise, seed)]
        other._dropped = dict(self._dropped)
        other._kept = None
        for place, name in enumerate(self.modalities if missing else []):
            mask = torch.zeros(self.num_items + 1, dtype=torch.bool)
            mask[_drawn(self.num_items, missing, seed + 7919 * (1 + place))] = True
            other._dropped[name] = mask | self._dropped.get(name, torch.zeros_like(mask))
        return other

    def features(self, ids_n: Tensor) -> dict[str, ModalRows]:
        """See `ItemFeatures`."""
        ids_n, device = ids_n.cpu(), ids_n.device
        found = {}
        for name in self.modalities:
            rows = self._folder.feature(name).rows(self._source[ids_n])
            if (dropped := self._dropped.get(name)) is not None:
                kept_n = ~dropped[ids_n]
                rows = ModalRows(rows.values * kept_n[:, None], rows.present & kept_n)
            found[name] = ModalRows(rows.values.to(device), rows.present.to(device))
        return found

    def all_features(self, device: torch.device | str, part: range | None = None) -> dict[str, ModalRows]:
        """See `ItemFeatures`; the last part asked for is kept in memory, as float32."""
        part = range(self.num_items + 1) if part is None else part
        if self._kept is None or self._kept[0] != part:
            self._kept = part, self.features(torch.arange(part.start, part.stop, device=device))
        return self._kept[1]


def _drawn(num_items: int, share: float, seed: int) -> Tensor:
    """`[round(share * V)]` item ids, the first ones of an order that the seed decides."""
    order = torch.randperm(num_items, generator=torch.Generator().manual_seed(seed))
    return 1 + order[: round(share * num_items)]


def _swapped(num_items: int, share: float, seed: int) -> Tensor:
    """`[V + 1]` the ids 0..V, of which the drawn ones have moved one place on in the order of drawing."""
    source = torch.arange(num_items + 1)
    drawn = _drawn(num_items, share, seed)
    source[drawn] = drawn.roll(1)
    return source
