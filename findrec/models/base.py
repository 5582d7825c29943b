"""What every sequence model looks like from the outside."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor

from findrec.datasets.batch import Batch, ModalRows
from findrec.datasets.catalogue import ItemFeatures
from findrec.models.precision import half_products
from findrec.models.recompute import Recomputing


@dataclass(frozen=True)
class Term:
    """An auxiliary loss of one microbatch: already weighted, averaged over a step's microbatches."""

    value: Tensor  # [] float32, what is added to the loss
    reported: Tensor  # [] float32, the unweighted value for the log, detached


@dataclass(frozen=True)
class Out:
    """What a model returns for a batch. T asked-for positions, d width of the item table."""

    h: Tensor  # [T, d] user vectors; a score is h . e_item (+ the repeat bonus)
    repeat: Tensor | None = None  # [T, R] weights of the repeat features (findrec/models/repeat.py)
    aux: dict[str, Term] = field(default_factory=dict)  # only in training mode
    diagnostics: dict[str, float] = field(default_factory=dict)  # only in training mode, cheap

    def float(self) -> Out:
        """The same in float32."""
        aux = {name: Term(term.value.float(), term.reported.float()) for name, term in self.aux.items()}
        repeat = None if self.repeat is None else self.repeat.float()
        return Out(self.h.float(), repeat, aux, self.diagnostics)


class SequenceModel(Recomputing, ABC):
    """Base of all sequence models ("towers"). The item table lives outside: a tower is given rows of it.

    Contract, tested for every registered model: causal; right padding and the other users of a batch
    change nothing in evaluation mode (1e-5); all randomness comes from torch's global generator, which
    the caller seeds for each microbatch.
    """

    content_scores = False  # whether `item_transform` does anything
    diagnosing = False  # whether the next training passes shall measure what is dear to measure too
    low_precision = False  # whether training passes multiply in bfloat16; they return float32 all the same

    def __call__(self, batch: Batch, x_items: Tensor, features: Mapping[str, ModalRows]) -> Out:
        """`forward`, in the precision that is asked for."""
        if not (self.low_precision and self.training):
            plain: Out = super().__call__(batch, x_items, features)
            return plain
        with half_products(x_items.device):
            out: Out = super().__call__(batch, x_items, features)
        return out.float()

    @abstractmethod
    def forward(self, batch: Batch, x_items: Tensor, features: Mapping[str, ModalRows]) -> Out:
        """User vectors at `batch.position`.

        `x_items` is `[U, d]`: the item-table rows of `batch.ids` (row 0, the padding item, is zero).
        `features` holds one `ModalRows` for each modality the model was built with.
        """

    def item_transform(self, rows: Tensor, features: Mapping[str, ModalRows]) -> Tensor:
        """The vectors items are scored by, `[n, d]`: their table rows, unless the model adds content.

        `rows` `[n, d]` and `features` belong to the same n items. Works on each item for itself.
        """
        return rows

    @torch.no_grad()
    def item_vectors(self, rows_nd: Tensor, catalogue: ItemFeatures, part: range | None = None) -> Tensor:
        """What items 0..V (or a `part` of them) are scored by, `[n, d]`, from their table rows (float32)."""
        if not self.content_scores:
            return rows_nd
        return self.item_transform(rows_nd, catalogue.all_features(rows_nd.device, part)).float()
