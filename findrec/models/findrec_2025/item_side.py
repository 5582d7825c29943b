"""Item vectors from ids and content features: `e_id + sum_m W_m m`, for inputs, scores or both.

With content, items without events can be ranked: their id row is zero, but their features are known. To train
for that, the id rows of a random share of the items are dropped in each microbatch (DropoutNet, Volkovs et
al. 2017, applied to the id vector).

Shape letters: n items, d width of the item table.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from findrec.datasets.folder.features import ModalRows
from findrec.devices import copy_to
from findrec.models.parts.content import ContentProjections


class ItemSide(ContentProjections):
    """Adds projected features to id rows."""

    def __init__(self, feature_dims: Mapping[str, int], dim: int, id_dropout: float) -> None:
        super().__init__(feature_dims, dim)
        self.id_dropout = id_dropout

    def forward(self, rows_nd: Tensor, features: Mapping[str, ModalRows]) -> Tensor:
        """Item vectors `[n, d]`; a missing modality adds nothing."""
        if self.training and self.id_dropout > 0:
            kept_n1 = torch.rand(len(rows_nd), 1) >= self.id_dropout
            rows_nd = rows_nd * copy_to(kept_n1, rows_nd.device).to(rows_nd.dtype)
        for content_nd in self.encode(features).values():
            rows_nd = rows_nd + content_nd
        return rows_nd
