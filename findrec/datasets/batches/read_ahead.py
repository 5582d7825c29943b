"""Reads the item features of a microbatch in the loader's thread, for a GPU.

A lookup during the microbatch would make the host wait for the ids, read, and make the GPU wait for the rows.
Here the ids are still on the CPU, so the rows, and which of them are present, are known before the microbatch
begins. They are copied from page-locked memory on a stream of their own, while the GPU computes earlier
microbatches; nothing but the kernels that read them waits for them. Rows of tables that are kept on the GPU
(`Catalogue.keep_on`) are looked up there.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol, runtime_checkable

import torch
from torch import Tensor

from findrec.datasets.batches.catalogue import Catalogue
from findrec.datasets.batches.examples import OnDevice
from findrec.datasets.folder.features import ModalRows
from findrec.devices import Arriving, CopyStream


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
    """Examples on the CPU, and the features of their items on the way to the GPU."""

    examples: OnDevice
    catalogue: Catalogue
    modalities: Sequence[str]  # of the features that were read ahead
    # By modality with a prefix: indices of the items that have it and, unless the tables are on the GPU, fp16
    # values [U, D] and mask [U].
    arriving: Arriving | None = None

    def to(self, device: torch.device | str) -> tuple[Any, Catalogue | FeaturesAhead]:
        """The examples and their features on a device."""
        examples = self.examples.to(device)
        if self.arriving is None:
            return examples, self.catalogue
        there = self.arriving.arrived()
        rows = {}
        found = self.catalogue.features(examples.ids) if self.catalogue.is_on_gpu else {}
        for name in self.modalities:
            index = there[_INDEX + name]
            if _VALUES + name in there:
                rows[name] = ModalRows(there[_VALUES + name].float(), there[_PRESENT + name], index)
            else:
                rows[name] = ModalRows(found[name].values, found[name].present, index)
        return examples, FeaturesAhead(self.catalogue, examples.ids, rows)


_INDEX, _VALUES, _PRESENT = "index ", "values ", "present "


class ReadAhead:
    """Reads the features of the items of a microbatch and copies them to a GPU on a stream of their own."""

    def __init__(self, catalogue: Catalogue, device: torch.device | str) -> None:
        self._catalogue, self._stream = catalogue, CopyStream(device)

    def __call__(self, examples: OnDevice) -> Prepared:
        """Called in the loader's thread; the copies are waited for by the GPU only, in `Prepared.to`."""
        catalogue = self._catalogue
        if not isinstance(examples, _OfItems) or not catalogue.modalities:
            return Prepared(examples, catalogue, [])
        names, ids_U = catalogue.modalities, examples.ids
        small = {_INDEX + name: catalogue.present_index(name, ids_U) for name in names}
        large = {}
        if not catalogue.is_on_gpu:
            for name in names:
                large[_VALUES + name], small[_PRESENT + name] = catalogue.stored_rows(name, ids_U)
        return Prepared(examples, catalogue, names, self._stream.copy(large, small))
