"""The adaptor of UniSRec: several parametric whitenings of the features of an item, mixed by gates.

Shape letters: n items, M width of a modality, E experts, d width.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from findrec.datasets.folder.features import ModalRows
from findrec.models.parts.layers import Dropout
from findrec.tables.initial_rows import TABLE_STD

NOISE_FLOOR = 0.01  # smallest standard deviation of the noise of gates, as in the public code


class Adaptor(nn.Module):
    """`sum_k g_k (x - b_k) W_k` with `g = softmax(x W_g + noise)`; zero for items without features.

    `(x - b) W` is computed as `x W + c`. The noise, in training and only if asked for, is normal with the
    standard deviation `softplus(x W_n) + 0.01`.
    """

    def __init__(self, width: int, dim: int, experts: int, dropout: float) -> None:
        super().__init__()
        self.experts = nn.Linear(width, experts * dim)
        self.gate = nn.Linear(width, experts, bias=False)
        self.noise = nn.Linear(width, experts, bias=False)
        self.dropout = Dropout(dropout)
        # Rows of length sqrt(M) give vectors as large as rows of the item table; gates start even.
        nn.init.normal_(self.experts.weight, std=TABLE_STD * (experts / (dim * width)) ** 0.5)
        nn.init.zeros_(self.experts.bias)
        nn.init.zeros_(self.gate.weight)
        nn.init.zeros_(self.noise.weight)

    def forward(self, rows: ModalRows, *, noisy: bool = False) -> Tensor:
        """Vectors `[n, d]` of the features of n items."""
        x_nM = F.layer_norm(rows.values, rows.values.shape[1:])  # whatever scale the encoder has
        logit_nE = self.gate(x_nM)
        if noisy and self.training:
            scale_nE = F.softplus(self.noise(x_nM)) + NOISE_FLOOR
            logit_nE = logit_nE + torch.randn_like(logit_nE) * scale_nE
        gate_nE = logit_nE.softmax(1)
        if noisy:
            x_nM = self.dropout(x_nM)
        white_nEd = self.experts(x_nM).view(len(x_nM), gate_nE.shape[1], -1)
        mixed_nd = torch.bmm(gate_nE[:, None], white_nEd).squeeze(1)
        return mixed_nd * rows.present[:, None]
