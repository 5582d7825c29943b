"""Items with a partner that was consumed close to them, as examples of the fusion stage.

Shape letters: n items, E training events.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields

import numpy as np
import pyarrow.compute as pc
import torch
from numpy.typing import NDArray
from torch import Tensor

from findrec.config import RunConfig
from findrec.datasets.batches.single_items import ItemExamples
from findrec.datasets.batches.training_pairs import negatives_rng
from findrec.datasets.folder.data_folder import DataFolder
from findrec.datasets.folder.splits import Int64Array
from findrec.devices import copy_to


@dataclass(frozen=True)
class ItemPairs:
    """Items of one microbatch; features are in `Microbatch.features`."""

    item: Tensor  # [n] int64, 1-based ids, distinct
    partner: Tensor  # [n] int64, an item consumed close to it; 0: none was drawn
    genre: Tensor  # [n] int64, number of the item's category; 0: unknown
    count: Tensor  # [n] int64, training events of the item
    partner_count: Tensor  # [n] int64, training events of the partner

    def to(self, device: torch.device | str) -> ItemPairs:
        """The same on another device."""
        return ItemPairs(*(copy_to(getattr(self, field.name), device) for field in fields(self)))


class ItemPairExamples(ItemExamples):
    """Each item of the catalogue once an epoch, with a partner (`ExampleSource` of `ItemPairs`).

    The partner of an item is an event at most `reach` events before or after a random training event of the
    item, of the same user. All training events are in memory (24 bytes each).
    """

    def __init__(self, config: RunConfig, folder: DataFolder, *, reach: int) -> None:
        super().__init__(config, folder)
        self._events, self._reach = _Events.read(folder), reach
        self._count = folder.train_count
        category = pc.dictionary_encode(folder.items.column("category").combine_chunks())
        self._genre = np.zeros(folder.num_items + 1, dtype=np.int64)
        self._genre[1:] = 1 + pc.fill_null(category.indices, -1).to_numpy(zero_copy_only=False)

    def read(self, epoch: int, parts: Sequence[Int64Array]) -> Sequence[ItemPairs]:  # type: ignore[override]
        """See `ExampleSource`."""
        return [self._examples(epoch, chosen) for chosen in parts]

    def dummy_examples(self, chosen: Int64Array) -> ItemPairs:  # type: ignore[override]
        """See `ExampleSource`: real examples, as events are in memory."""
        return self._examples(0, chosen)

    def _examples(self, epoch: int, chosen: Int64Array) -> ItemPairs:
        item = self._item[chosen]
        rng = negatives_rng(self._training.seed, epoch, chosen)
        partner = self._events.draw(rng, item, self._reach)
        numbers = item, partner, self._genre[item], self._count[item], self._count[partner]
        return ItemPairs(*(torch.from_numpy(number.astype(np.int64)) for number in numbers))

    def num_shards(self, chosen: Int64Array) -> int:
        """See `ExampleSource`: every worker reads all training events."""
        return len(self._folder.manifest.shards)

    def identity(self) -> list[object]:
        """See `ExampleSource`."""
        return ["item pairs", self._reach, self.num_examples]


@dataclass(frozen=True)
class _Events:
    """All training events in user order, and for each item where it occurs."""

    item: Int64Array  # [E]
    user: Int64Array  # [E] row of the data folder
    order: Int64Array  # [E] events sorted by item
    offset: Int64Array  # [V + 2] the events of item v are order[offset[v]:offset[v + 1]]

    @staticmethod
    def read(folder: DataFolder) -> _Events:
        items: list[NDArray[np.int64]] = []
        users: list[NDArray[np.int64]] = []
        first = 0
        for block in folder.blocks():
            events = np.diff(block.offset)
            row = np.repeat(np.arange(len(events)), events)
            position = np.arange(len(row)) - (block.offset[:-1] - block.offset[0])[row]
            training = position < folder.valid_start[first + row]
            items.append(block.item[block.offset[0] : block.offset[-1]][training].astype(np.int64))
            users.append(first + row[training])
            first += len(events)
        item, user = np.concatenate(items), np.concatenate(users)
        offset = np.concatenate([[0], np.cumsum(np.bincount(item, minlength=folder.num_items + 1))])
        return _Events(item, user, np.argsort(item, kind="stable"), offset)

    def draw(self, rng: np.random.Generator, item_n: Int64Array, reach: int) -> Int64Array:
        """A partner of each item; 0 for items without events, and where the draw leaves the history."""
        first, last = self.offset[item_n], self.offset[item_n + 1]
        choice = rng.random(len(item_n))
        distance = rng.integers(1, reach + 1, size=len(item_n)) * rng.choice([-1, 1], size=len(item_n))
        if not len(self.item):
            return np.zeros_like(item_n)
        index = np.minimum(first + (choice * (last - first)).astype(np.int64), len(self.order) - 1)
        event = self.order[index]
        other = event + distance
        inside = np.clip(other, 0, len(self.item) - 1)
        valid = (last > first) & (other == inside) & (self.user[inside] == self.user[event])
        partner = np.where(valid, self.item[inside], 0)
        return np.where(partner == item_n, 0, partner)
