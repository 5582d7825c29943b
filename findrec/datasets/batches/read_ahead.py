"""Reads the item features of a microbatch in the loader's thread, for a GPU.

A lookup during the microbatch would make the host wait for the ids, read, and make the GPU wait for the rows.
Here the ids are still on the CPU, so the rows, and which of them are present, are known before the microbatch
begins. Rows of tables that are kept on the GPU (`Catalogue.keep_on`) are looked up there.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Protocol, runtime_checkable

import torch
from torch import Tensor

from findrec.datasets.batches.catalogue import Catalogue
from findrec.datasets.batches.examples import OnDevice
from findrec.datasets.folder.features import ModalRows
from findrec.devices import copy_all_to, copy_to


@runtime_checkable
class _OfItems(Protocol):
    """Examples that name the items whose features a model will ask for, such as `Batch`."""

    ids: Tensor  # [U] int64


class FeaturesAhead:
    """`ItemFeatures` of a catalogue, with those of the items `ids_U` at hand, on their device."""

    def __init__(self, catalogue: Catalogue, ids_U: Tensor, rows: Mapping[str, ModalRows]) -> None:
        self._catalogue, self._ids_U, self._rows = catalogue, ids_U, rows

    def features(self, ids_n: Tensor) -> Mapping[str, ModalRows]:
        """See `ItemFeatures`; at hand for the very tensor of ids that the examples hold."""
        return self._rows if ids_n is self._ids_U else self._catalogue.features(ids_n)

    def all_features(self, device: torch.device | str, part: range | None = None) -> Mapping[str, ModalRows]:
        """See `ItemFeatures`."""
        return self._catalogue.all_features(device, part)


@dataclass(frozen=True)
class Prepared:
    """Examples on the CPU with the stored features of their items, by modality."""

    examples: OnDevice
    catalogue: Catalogue
    index: Mapping[str, Tensor]  # [n] indices of the items that have the modality
    # fp16 [U, D] and mask [U]; empty if the tables are on the GPU
    stored: Mapping[str, tuple[Tensor, Tensor]]

    def to(self, device: torch.device | str) -> tuple[Any, Catalogue | FeaturesAhead]:
        """The examples and their features on a device."""
        examples = self.examples.to(device)
        if not self.index:
            return examples, self.catalogue
        if self.stored:
            found = {
                name: ModalRows(copy_to(values, device).float(), copy_to(present, device))
                for name, (values, present) in self.stored.items()
            }
        else:
            found = self.catalogue.features(examples.ids)
        index = copy_all_to(self.index, device)
        rows = {name: ModalRows(found[name].values, found[name].present, index[name]) for name in index}
        return examples, FeaturesAhead(self.catalogue, examples.ids, rows)


def read_ahead(catalogue: Catalogue, examples: OnDevice, device: torch.device) -> Prepared:
    """Read the features of the items of `examples` for a GPU, into memory that it reads by itself."""
    if not isinstance(examples, _OfItems):
        return Prepared(examples, catalogue, {}, {})
    names, ids_U = catalogue.modalities, examples.ids
    index = {name: catalogue.present_index(name, ids_U) for name in names}
    stored = {} if catalogue.is_on_gpu else {name: catalogue.stored_rows(name, ids_U) for name in names}
    if device.type == "cuda":
        with torch.cuda.device(device):  # a new thread is on the first GPU
            stored = {
                name: (values.pin_memory(), mask.pin_memory()) for name, (values, mask) in stored.items()
            }
    return Prepared(examples, catalogue, index, stored)
