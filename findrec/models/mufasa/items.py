"""Item vectors of the sequence model, from table rows and fused content.

    v_i = s LN(W f_i + e_i)      what items are scored by; s = 0.2 / sqrt(d), as long as rows are at first
    x_i = W' [f_i; sqrt(d) e_i]  what enters the sequence

An item without events has e_i = 0, so v_i = s LN(W f_i): it is served from its content. That W f_i takes the
direction of e_i, where both are known, is the aim of the consistency loss (`preference.py`).

Shape letters: n items, f width of fused vectors, d width of rows.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from findrec.tables.initial_rows import TABLE_STD


class ItemVectors(nn.Module):
    """Composes item vectors; an item with neither content nor row has the vector 0."""

    def __init__(self, fused: int, dim: int) -> None:
        super().__init__()
        self.dim = dim
        self.content = nn.Linear(fused, dim, bias=False)
        self.mix = nn.Linear(fused + dim, dim, bias=False)
        nn.init.normal_(self.content.weight, std=TABLE_STD * (dim * fused) ** -0.5)

    def forward(self, rows_nd: Tensor, fused_nf: Tensor) -> tuple[Tensor, Tensor]:
        """The content W f `[n, d]`, at the scale of rows, and the inputs x `[n, d]` divided by sqrt(d)."""
        content_nd: Tensor = self.content(fused_nf)
        token_nd = self.mix(torch.cat([fused_nf, rows_nd * self.dim**0.5], dim=1))
        return content_nd, token_nd * self.dim**-0.5

    def score(self, rows_nd: Tensor, content_nd: Tensor) -> Tensor:
        """The vectors v `[n, d]`."""
        normed_nd = F.layer_norm(rows_nd + content_nd, (self.dim,), eps=1e-8)
        vectors_nd: Tensor = normed_nd * (TABLE_STD * self.dim**-0.5)
        return vectors_nd
