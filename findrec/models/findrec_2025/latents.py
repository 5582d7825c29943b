"""Encodes the features of a modality to Gaussian latents, once per distinct item of a batch.

Shape letters: U distinct items of a batch, M width of the features, d width of the latents and of the item
table, n items that have the modality.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from findrec.datasets.folder.features import ModalRows
from findrec.models.parts.layers import Dropout, project_normed

LOGVAR_RANGE = (-8.0, 4.0)
INITIAL_LOGVAR = -2.0  # noise starts well below the spread of the means


class Latents(NamedTuple):
    """Latents of one modality for the distinct items of a batch."""

    z_Ud: Tensor  # samples in training, else means; the learned `missing` vector if absent
    mean_nd: Tensor  # of the items that have the modality
    logvar_nd: Tensor
    present_n: Tensor  # int64, their indices among the U items

    def float(self) -> Latents:
        """The same in float32."""
        return Latents(self.z_Ud.float(), self.mean_nd.float(), self.logvar_nd.float(), self.present_n)


class ModalEncoder(nn.Module):
    """Features to `N(mean, exp(logvar))` of each item; a learned vector replaces a missing modality."""

    uses_child_weights = True  # `project_normed` reads weights of the norm and the projection

    def __init__(self, num_features: int, dim: int, dropout: float) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(num_features)
        self.widen = nn.Linear(num_features, 2 * dim)
        self.norm_hidden = nn.LayerNorm(2 * dim)
        self.dropout = Dropout(dropout)
        self.mean = nn.Linear(2 * dim, dim)
        self.logvar = nn.Linear(2 * dim, dim)
        nn.init.constant_(self.logvar.bias, INITIAL_LOGVAR)
        self.missing = nn.Parameter(torch.randn(dim) * 0.1)

    def forward(self, rows: ModalRows) -> Latents:
        """Encode the items that have the modality."""
        present_n = rows.present_index
        hidden = F.gelu(self.norm_hidden(project_normed(self.norm, self.widen, rows.values[present_n])))
        hidden = self.dropout(hidden)
        mean_nd, logvar_nd = self.mean(hidden), self.logvar(hidden).clamp(*LOGVAR_RANGE)
        z_nd = mean_nd
        if self.training:
            z_nd = z_nd + torch.randn_like(z_nd) * torch.exp(0.5 * logvar_nd)
        z_Ud = self.missing.to(z_nd.dtype).expand(len(rows.present), -1).index_copy(0, present_n, z_nd)
        return Latents(z_Ud, mean_nd, logvar_nd, present_n)
