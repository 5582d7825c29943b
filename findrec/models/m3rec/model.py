"""M3Rec: Mamba layers shared by the sequences of ids and of each modality (Xu et al., ICASSP 2025).

README.md in this folder has the equations and what differs from the public code.

Shape letters: B users, L steps, T target positions, S streams (id and modalities), d width of a stream.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from findrec.datasets.batches.batch import Batch
from findrec.datasets.folder.features import ModalRows
from findrec.models.base import DataFacts, Out, SequenceModel
from findrec.models.m3rec.config import M3RecConfig
from findrec.models.parts.content import ContentProjections
from findrec.models.parts.layers import Dropout, Inputs, WaitTimeModulation, gather_positions
from findrec.models.parts.mamba import MambaStream
from findrec.models.parts.repeat import RepeatHead
from findrec.ops.scan.selective_scan import scan_backend


class FeedForward(nn.Module):
    """The position-wise network of one stream: `LN(x + network(LN(x)))`."""

    def __init__(self, dim: int, dropout: float) -> None:
        super().__init__()
        self.norm_in, self.norm_out = nn.LayerNorm(dim), nn.LayerNorm(dim)
        self.feed_in, self.feed_out = nn.Linear(dim, 4 * dim), nn.Linear(4 * dim, dim)
        self.dropout = Dropout(dropout)

    def forward(self, x_Td: Tensor) -> Tensor:
        """`[T, d]` to `[T, d]`."""
        fed_Td = self.feed_out(F.gelu(self.feed_in(self.norm_in(x_Td))))
        normed_Td: Tensor = self.norm_out(x_Td + self.dropout(fed_Td))
        return normed_Td


class M3Rec(SequenceModel):
    """The M3Rec network. Without modalities the id is its only stream."""

    Config = M3RecConfig

    def __init__(self, config: M3RecConfig, facts: DataFacts) -> None:
        super().__init__()
        self.config = config
        dim, streams = config.dim, 1 + len(facts.feature_dims)
        self.inputs = Inputs(dim, config.dropout, gaps=config.gaps, num_event_types=facts.num_event_types)
        self.content = ContentProjections(facts.feature_dims, dim)
        self.content_scores = bool(facts.feature_dims)
        self.layers = nn.ModuleList(
            [MambaStream(dim, config.dropout, config.stream) for _ in range(1 if config.shared else streams)]
        )
        self.feeds = nn.ModuleList([FeedForward(dim, config.dropout) for _ in range(streams)])
        self.weight = None
        if config.weights == "learned" and self.content_scores:
            self.weight = nn.Parameter(torch.ones(streams - 1))
        self.moment = WaitTimeModulation(streams * dim) if config.wait else None
        self.repeat_head = RepeatHead(streams * dim) if config.repeat else None

    def forward(self, batch: Batch, x_items: Tensor, features: Mapping[str, ModalRows]) -> Out:
        """See `SequenceModel`."""
        streams = [self.inputs(batch, x_items)]
        streams += [
            latent_Ud[batch.index] * self.inputs.scale for latent_Ud in self.content.encode(features).values()
        ]
        encoded: Sequence[Tensor]
        if self.config.shared:  # one pass over all streams as if they were users
            encoded = self.layers[0](self.inputs.drop(torch.cat(streams))).chunk(len(streams))
        else:
            encoded = [
                layers(self.inputs.drop(x_BLd)) for layers, x_BLd in zip(self.layers, streams, strict=True)
            ]
        parts = [
            feed(gather_positions(x_BLd, batch)) for feed, x_BLd in zip(self.feeds, encoded, strict=True)
        ]
        if self.weight is not None:
            parts[1:] = [weight * part for weight, part in zip(self.weight, parts[1:], strict=True)]
        h_Tv = torch.cat(parts, dim=1)
        if self.moment is not None:
            h_Tv = self.moment(h_Tv, batch)
        return Out(h_Tv, None if self.repeat_head is None else self.repeat_head(h_Tv))

    def item_transform(self, rows: Tensor, features: Mapping[str, ModalRows]) -> Tensor:
        """See `SequenceModel`: the row and the latents of the item, `[n, S * d]`."""
        return torch.cat([rows, *self.content.encode(features).values()], dim=1)

    def describe(self, device: torch.device) -> str:
        """See `Model`."""
        return f"scan {scan_backend(device, self.config.stream.scan)}"
