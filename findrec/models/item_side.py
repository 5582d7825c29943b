"""Item vectors made of an id and of content: `e_id + sum_m W_m m` (specified for inputs, scores or both).

Content lets an item be ranked that nobody has met yet: its id row is zero, its features are known. For that
the content must be worth something without the id, so in training a share of the items, drawn anew for each
microbatch, goes without (DropoutNet, Volkovs et al. 2017, applied to the item's own id vector).
Shape letters: n items, M width of a modality, d width of the item table.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from findrec.datasets.batch import ModalRows
from findrec.models.layers import project_normed

TABLE_STD = 0.2  # times d^-0.5: the spread item rows start with; content starts with the same


class ItemSide(nn.Module):
    """Adds projected features to id rows."""

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
        """`[n, d]`; a missing modality adds nothing."""
        if self.training and self.id_dropout > 0:
            rows_nd = rows_nd * (torch.rand(len(rows_nd), 1) >= self.id_dropout).to(rows_nd)
        for name, project in self.projections.items():
            modal = features[name]
            norm = self.norms[name]
            assert isinstance(norm, nn.LayerNorm)
            assert isinstance(project, nn.Linear)
            content_nd = project_normed(norm, project, modal.values)
            rows_nd = rows_nd + content_nd * modal.present[:, None]
        return rows_nd
