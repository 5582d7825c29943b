"""Attention whose weights come from frozen content, and whose values come from ids.

Shape letters: B users, L steps, H heads, d width, n items, M width of a modality.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from findrec.datasets.batches.batch import Batch
from findrec.datasets.folder.features import ModalRows
from findrec.models.parts.layers import Dropout, project_normed
from findrec.models.parts.transformer import LearnedPositions


class Guide(nn.Module):
    """The content of each event, which queries and keys are made of: projections, plus its position.

    The sum over modalities of `P_m LN(c_m)`, zero where content is missing, has about unit variance. The
    position tells recent from old, and is all that is known of an event without content.
    """

    uses_child_weights = True  # `project_normed` reads weights of the norms and projections

    def __init__(self, feature_dims: Mapping[str, int], dim: int, max_length: int) -> None:
        super().__init__()
        self.norms = nn.ModuleDict({name: nn.LayerNorm(width) for name, width in feature_dims.items()})
        self.projections = nn.ModuleDict(
            {name: nn.Linear(width, dim, bias=False) for name, width in feature_dims.items()}
        )
        for name, width in feature_dims.items():
            projection = self.projections[name]
            assert isinstance(projection, nn.Linear)
            nn.init.normal_(projection.weight, std=(width * len(feature_dims)) ** -0.5)
        self.position = LearnedPositions(max_length, dim)
        nn.init.normal_(self.position.weight, std=0.1)

    def forward(self, batch: Batch, features: Mapping[str, ModalRows]) -> Tensor:
        """`[B, L, d]`."""
        rows, length = batch.item.shape
        position_Ld: Tensor = self.position(length)
        guide_BLd = position_Ld.expand(rows, -1, -1)
        for name, project in self.projections.items():
            norm, content = self.norms[name], features[name]
            assert isinstance(norm, nn.LayerNorm)
            assert isinstance(project, nn.Linear)
            content_Ud = project_normed(norm, project, content.values) * content.present[:, None]
            guide_BLd = guide_BLd + content_Ud[batch.index]
        return guide_BLd


class GuidedBlock(nn.Module):
    """A pre-normalised Transformer block whose queries and keys are not those of its input.

    They are `W_q g` and `W_k g` of the guide g, with `W_q = W_k` at first: an event attends to events of
    similar content before anything is learned. Values are `W_v LN(x)` of the stream x of ids, which alone is
    passed on. With `ids` queries and keys are those of the guide plus those of `LN(x)`.
    """

    def __init__(self, dim: int, heads: int, dropout: float, *, ids: bool) -> None:
        super().__init__()
        self.heads = heads
        self.norm_attention = nn.LayerNorm(dim)
        self.value, self.out = nn.Linear(dim, dim), nn.Linear(dim, dim)
        self.by_guide = nn.Linear(dim, 2 * dim, bias=False)
        self.by_ids = nn.Linear(dim, 2 * dim) if ids else None
        self.norm_feed = nn.LayerNorm(dim)
        self.feed_in, self.feed_out = nn.Linear(dim, 4 * dim), nn.Linear(4 * dim, dim)
        self.dropout = Dropout(dropout)
        for linear in (self.value, self.out, self.feed_in, self.feed_out, self.by_ids):
            if linear is not None:
                nn.init.xavier_uniform_(linear.weight)
                nn.init.zeros_(linear.bias)
        with torch.no_grad():
            query, key = self.by_guide.weight.chunk(2)
            nn.init.orthogonal_(query)
            key.copy_(query)

    def queries_and_keys(self, normed_BLd: Tensor, guide_BLd: Tensor) -> Tensor:
        """`[B, L, 2d]`, queries first."""
        both_BLe: Tensor = self.by_guide(guide_BLd)
        return both_BLe if self.by_ids is None else both_BLe + self.by_ids(normed_BLd)

    def forward(self, x_BLd: Tensor, guide_BLd: Tensor) -> Tensor:
        """`[B, L, d]` to `[B, L, d]`, causal."""
        b, length, dim = x_BLd.shape
        normed_BLd = self.norm_attention(x_BLd)
        query_key = self.queries_and_keys(normed_BLd, guide_BLd)
        q, k, v = (
            part.view(b, length, self.heads, -1).transpose(1, 2)
            for part in (*query_key.chunk(2, dim=-1), self.value(normed_BLd))
        )
        mixed = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        x_BLd = x_BLd + self.dropout(self.out(mixed.transpose(1, 2).reshape(b, length, dim)))
        fed = self.feed_out(F.gelu(self.feed_in(self.norm_feed(x_BLd))))
        sum_BLd: Tensor = x_BLd + self.dropout(fed)
        return sum_BLd
