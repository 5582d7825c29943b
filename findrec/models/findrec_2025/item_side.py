"""Item vectors from ids and content features: `e_id + sum_m W_m m`, for inputs, scores or both.

With content, items without events can be ranked: their id row is zero, but their features are known. To train
for that, the id rows of a random share of the items are dropped in each microbatch (DropoutNet, Volkovs et
al. 2017, applied to the id vector).

Shape letters: n items, M width of a modality, d width of the item table.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from findrec.datasets.folder.features import ModalRows
from findrec.devices import copy_to
from findrec.models.parts.layers import project_normed
from findrec.tables.initial_rows import TABLE_STD


class ItemSide(nn.Module):
    """Adds projected features to id rows."""

    uses_child_weights = True  # `project_normed` reads weights of the norms and projections

    def __init__(self, feature_dims: Mapping[str, int], dim: int, id_dropout: float) -> None:
        super().__init__()
        self.id_dropout = id_dropout
        self.norms = nn.ModuleDict({name: nn.LayerNorm(width) for name, width in feature_dims.items()})
        self.projections = nn.ModuleDict(
            {name: nn.Linear(width, dim, bias=False) for name, width in feature_dims.items()}
        )
        for name, width in feature_dims.items():
            projection = self.projections[name]
            assert isinstance(projection, nn.Linear)
            nn.init.normal_(projection.weight, std=TABLE_STD * (dim * width) ** -0.5)

    def forward(self, rows_nd: Tensor, features: Mapping[str, ModalRows]) -> Tensor:
        """Item vectors `[n, d]`; a missing modality adds nothing."""
        if self.training and self.id_dropout > 0:
            kept_n1 = torch.rand(len(rows_nd), 1) >= self.id_dropout
            rows_nd = rows_nd * copy_to(kept_n1, rows_nd.device).to(rows_nd.dtype)
        for name, project in self.projections.items():
            modal = features[name]
            norm = self.norms[name]
            assert isinstance(norm, nn.LayerNorm)
            assert isinstance(project, nn.Linear)
            content_nd = project_normed(norm, project, modal.values)
            rows_nd = rows_nd + content_nd * modal.present[:, None]
        return rows_nd
