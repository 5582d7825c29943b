"""Modal features of items, looked up by id: for a batch's items and for those a loss ranks."""

from __future__ import annotations

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
        self._source = torch.arange(folder.num_items + 1)  # whose features each item has
        generator = torch.Generator().manual_seed(seed)
        swapped = 1 + torch.randperm(folder.num_items, generator=generator)[: round(noise * folder.num_items)]
        self._source[swapped] = swapped.roll(1)
        self.modalities = list(modalities)
        self._folder = folder
        self._kept: tuple[range, dict[str, ModalRows]] | None = None

    def features(self, ids_n: Tensor) -> dict[str, ModalRows]:
        """See `ItemFeatures`."""
        source_n = self._source[ids_n.cpu()]
        rows = {m: self._folder.feature(m).rows(source_n) for m in self.modalities}
        device = ids_n.device
        return {m: ModalRows(r.values.to(device), r.present.to(device)) for m, r in rows.items()}

    def all_features(self, device: torch.device | str, part: range | None = None) -> dict[str, ModalRows]:
        """See `ItemFeatures`; the last part asked for is kept in memory, as float32."""
        part = range(self.num_items + 1) if part is None else part
        if self._kept is None or self._kept[0] != part:
            self._kept = part, self.features(torch.arange(part.start, part.stop, device=device))
        return self._kept[1]
