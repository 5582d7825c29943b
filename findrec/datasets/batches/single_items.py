"""Single items as examples, for models that are trained on item content rather than interactions."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from findrec.config import RunConfig
from findrec.datasets.batches.examples import EqualSizeExamples
from findrec.datasets.folder.data_folder import DataFolder
from findrec.datasets.folder.splits import Int64Array
from findrec.devices import copy_to

_NAMED_ITEMS = 3


@dataclass(frozen=True)
class ItemIds:
    """Items of one microbatch; their features are in `Microbatch.features`."""

    item: Tensor  # [n] int64, 1-based ids, distinct

    def to(self, device: torch.device | str) -> ItemIds:
        """The same on another device."""
        return ItemIds(copy_to(self.item, device))


class ItemExamples(EqualSizeExamples):
    """Each item of the catalogue is an example once an epoch, with or without events (`ExampleSource`).

    Items that a grown data folder keeps only to preserve ids are omitted.
    """

    def __init__(self, config: RunConfig, folder: DataFolder) -> None:
        self._item = 1 + np.flatnonzero(~folder.gone[1:])
        super().__init__(config, folder, len(self._item))

    def read(self, epoch: int, parts: Sequence[Int64Array]) -> list[ItemIds]:
        """See `ExampleSource`."""
        return [self.dummy_examples(chosen) for chosen in parts]

    def describe(self, chosen: Int64Array) -> str:
        """See `ExampleSource`: the raw ids of the items."""
        raw = self._folder.items.column("raw")
        names = ", ".join(repr(raw[int(v) - 1].as_py()) for v in self._item[chosen[:_NAMED_ITEMS]])
        more = f" and {len(chosen) - _NAMED_ITEMS} more" if len(chosen) > _NAMED_ITEMS else ""
        return f"items {names}{more}"

    def dummy_examples(self, chosen: Int64Array) -> ItemIds:
        """See `ExampleSource`: real examples, as ids are in memory."""
        return ItemIds(torch.from_numpy(self._item[chosen]))

    def num_shards(self, chosen: Int64Array) -> int:
        """See `ExampleSource`: no events are read."""
        return 0

    def identity(self) -> list[object]:
        """See `ExampleSource`."""
        return ["items", self.num_examples]
