"""Projections of the features of items to vectors of the width of the item table.

Shape letters: n items, M width of a modality, d width of the vectors.
"""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor, nn

from findrec.datasets.folder.features import ModalRows
from findrec.models.parts.layers import project_normed
from findrec.tables.initial_rows import TABLE_STD


class ContentProjections(nn.Module):
    """A normalisation and a projection for each modality; at first as large as rows of the item table."""

    uses_child_weights = True  # `project_normed` reads weights of the norms and projections

    def __init__(self, feature_dims: Mapping[str, int], dim: int) -> None:
        super().__init__()
        self.norms = nn.ModuleDict({name: nn.LayerNorm(width) for name, width in feature_dims.items()})
        self.projections = nn.ModuleDict(
            {name: nn.Linear(width, dim, bias=False) for name, width in feature_dims.items()}
        )
        for name, width in feature_dims.items():
            projection = self.projections[name]
            assert isinstance(projection, nn.Linear)
            nn.init.normal_(projection.weight, std=TABLE_STD * (dim * width) ** -0.5)

    def encode(self, features: Mapping[str, ModalRows]) -> dict[str, Tensor]:
        """The vectors `[n, d]` of each modality; zero where it is missing."""
        vectors = {}
        for name, project in self.projections.items():
            norm, rows = self.norms[name], features[name]
            assert isinstance(norm, nn.LayerNorm)
            assert isinstance(project, nn.Linear)
            vectors[name] = project_normed(norm, project, rows.values) * rows.present[:, None]
        return vectors
