"""The fusion layer: one vector for each item from all its modalities, with the title as anchor.

    a_k = LN(W_k m_k) + b_k                          for each modality k that the item has
    c   = CrossAttention(query: a_0, keys and values: a_0 .. a_K), one or two layers
    f   = LN(a_0 + sigmoid(w [a_0; c]) c)

Items without the anchor have a learned vector instead of a_0; those without any content have f = 0.

Shape letters: n items, K tokens (modalities and the learned vector), f width of fused vectors, H heads.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from findrec.datasets.folder.features import ModalRows
from findrec.errors import FindRecError, suggest
from findrec.models.mufasa.config import MEAN, FusionConfig


@dataclass(frozen=True)
class Fused:
    """The output of the fusion layer."""

    fused_nf: Tensor
    streams: dict[str, Tensor]  # by modality: a_k [n, f], without b_k; zero where it is missing
    present_n: Tensor  # bool, whether the item has any content


class CrossAttention(nn.Module):
    """Reads tokens by one query per item; tokens that are not present are not read."""

    def __init__(self, dim: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.norm = nn.LayerNorm(dim)
        self.query = nn.Linear(dim, dim)
        self.read = nn.Linear(dim, 2 * dim)
        self.out = nn.Linear(dim, dim)

    def forward(self, query_nf: Tensor, token_nKf: Tensor, present_nK: Tensor) -> Tensor:
        """`[n, f]`; each item must have a token that is present."""
        q_nHc = self.query(self.norm(query_nf)).unflatten(1, (self.heads, -1))
        k, v = self.read(token_nKf).unflatten(2, (2, self.heads, -1)).unbind(2)  # [n, K, H, c]
        # Few tokens: sums of products, where a batched matrix product would be one call for each item.
        logit_nKH = (q_nHc[:, None] * k).sum(-1) * q_nHc.shape[-1] ** -0.5
        weight_nKH = logit_nKH.masked_fill(~present_nK[..., None], -torch.inf).softmax(1)
        read_nf: Tensor = self.out((weight_nKH[..., None] * v).sum(1).flatten(1))
        return read_nf


class FusionLayer(nn.Module):
    """Maps the features of items to fused vectors; items do not depend on each other."""

    def __init__(self, feature_dims: Mapping[str, int], anchor: str, config: FusionConfig) -> None:
        """Raises `FindRecError` if the data lacks the anchor."""
        super().__init__()
        check_anchor(anchor, feature_dims)
        dim = config.dim
        self.anchor, self.names = anchor, list(feature_dims)
        self.drop = config.drop_modality
        self.adapters = nn.ModuleDict({name: nn.Linear(width, dim) for name, width in feature_dims.items()})
        self.norms = nn.ModuleDict({name: nn.LayerNorm(dim) for name in feature_dims})
        self.kind = nn.Parameter(0.1 * torch.randn(len(feature_dims), dim))  # b_k
        self.missing = nn.Parameter(0.1 * torch.randn(dim))
        self.reads = nn.ModuleList([CrossAttention(dim, config.heads) for _ in range(config.layers)])
        self.gate = nn.Linear(2 * dim, 1)
        self.norm = nn.LayerNorm(dim)

    def forward(self, features: Mapping[str, ModalRows], *, hide: bool = False) -> Fused:
        """Fused vectors; with `hide`, modalities other than the anchor are hidden from random items."""
        present = {name: features[name].present for name in self.names}
        streams = {}
        for name in self.names:
            adapted = self.norms[name](self.adapters[name](features[name].values))
            streams[name] = adapted * present[name][:, None]
        some_n = torch.stack(list(present.values())).any(0)
        shown_nK = torch.stack([self._shown(name, present[name], hide) for name in self.names], dim=1)
        token_nKf = torch.stack(list(streams.values()), dim=1) + self.kind * shown_nK[..., None]
        token_nKf = token_nKf * shown_nK[..., None]
        query_nf = self._query(token_nKf, shown_nK)
        missing_n1f = self.missing.expand(len(query_nf), 1, -1)
        token_nKf = torch.cat([token_nKf, missing_n1f], dim=1)
        shown_nK = F.pad(shown_nK, (0, 1), value=True)  # so that each item has a token
        read_nf = torch.zeros_like(query_nf)
        for layer in self.reads:
            read_nf = read_nf + layer(query_nf + read_nf, token_nKf, shown_nK)
        gate_n1 = torch.sigmoid(self.gate(torch.cat([query_nf, read_nf], dim=1)))
        fused_nf = self.norm(query_nf + gate_n1 * read_nf) * some_n[:, None]
        return Fused(fused_nf, streams, some_n)

    def _shown(self, name: str, present_n: Tensor, hide: bool) -> Tensor:
        if not hide or name == self.anchor or not self.drop:
            return present_n
        return present_n & (torch.rand(len(present_n), device=present_n.device) >= self.drop)

    def _query(self, token_nKf: Tensor, shown_nK: Tensor) -> Tensor:
        """The anchor's token, or the mean of all; the learned vector where there is none."""
        if self.anchor == MEAN:
            count_n1 = shown_nK.sum(1, keepdim=True)
            query_nf, has_n1 = token_nKf.sum(1) / count_n1.clamp(min=1), count_n1 > 0
        else:
            index = self.names.index(self.anchor)
            query_nf, has_n1 = token_nKf[:, index], shown_nK[:, index : index + 1]
        return torch.where(has_n1, query_nf, self.missing)


def check_anchor(anchor: str, feature_dims: Mapping[str, int]) -> None:
    """Raise `FindRecError` if the data has no features of the anchor, or no features at all."""
    if (anchor != MEAN and anchor not in feature_dims) or not feature_dims:
        have = ", ".join(feature_dims) or "none"
        raise FindRecError(
            f"model.anchor={anchor!r} is not among the modalities that the model reads ({have})"
            f"{suggest(anchor, feature_dims)}. Add features of titles with `findrec features`, or set "
            f"model.anchor to one of these modalities or to {MEAN!r}"
        )


def anchor_features(features: Mapping[str, ModalRows], anchor: str) -> tuple[Tensor, Tensor]:
    """Features `[n, M]` of the anchor as unit vectors, and which items have them `[n]`.

    Of the mean of all modalities, the unit vectors of each beside each other: cosines are then the mean of
    those of the modalities that an item has.
    """
    names = list(features) if anchor == MEAN else [anchor]
    units = [F.normalize(features[n].values, dim=1) * features[n].present[:, None] for n in names]
    present_n = torch.stack([features[name].present for name in names]).any(0)
    return F.normalize(torch.cat(units, dim=1), dim=1), present_n


def anchor_width(feature_dims: Mapping[str, int], anchor: str) -> int:
    """The width M of `anchor_features`."""
    return sum(feature_dims.values()) if anchor == MEAN else feature_dims[anchor]
