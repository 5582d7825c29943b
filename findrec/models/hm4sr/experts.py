"""The two levels of experts: over the parts of an item, and over its time.

All experts are parameters of the model. In the public code those of the second level are kept in a Python
list, so that no optimizer trains them and no checkpoint saves them.

Shape letters: B users, L steps, S streams (id and modalities), K experts, d width of a stream.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

SCALE_STD = 0.1


class InteractiveExperts(nn.Module):
    """Experts that map all streams of an item together; each stream mixes them by a gate of its own.

        x_s + w_s sum_k softmax(G_s x_s)_k  (A_k [x_1; ...; x_S] + a_k)_s

    The weights w start at 0 for the id and 1 for content, as in the public code: content needs to be
    filtered, ids are learned anyway.
    """

    def __init__(self, dim: int, streams: int, experts: int) -> None:
        super().__init__()
        self.experts = experts
        self.expert = nn.Linear(streams * dim, experts * streams * dim)
        self.gates = nn.ModuleList([nn.Linear(dim, experts) for _ in range(streams)])
        self.weight = nn.Parameter(torch.ones(streams))
        with torch.no_grad():
            self.weight[0] = 0.0

    def forward(self, x_BLSd: Tensor) -> Tensor:
        """`[B, L, S, d]` to the same shape."""
        y_BLKSd = self.expert(x_BLSd.flatten(2)).unflatten(2, (self.experts, *x_BLSd.shape[2:]))
        logit_BLSK = torch.stack([gate(x_BLSd[:, :, s]) for s, gate in enumerate(self.gates)], dim=2)
        gate_BLSK = logit_BLSK.softmax(-1).to(y_BLKSd.dtype)
        mixed_BLSd = torch.einsum("blsk,blksd->blsd", gate_BLSK, y_BLKSd)
        sum_BLSd: Tensor = x_BLSd + self.weight[:, None] * mixed_BLSd
        return sum_BLSd


class TemporalExperts(nn.Module):
    """Experts that scale the channels of all streams, mixed by the time of the event.

        x * sum_k softmax(G t)_k s_k

    Scales start around 1, so that the event passes unchanged at first (around 0 in the public code, where
    they stay as they were drawn).
    """

    def __init__(self, dim: int, streams: int, experts: int, time_width: int) -> None:
        super().__init__()
        self.gate = nn.Linear(time_width, experts)
        self.scale = nn.Parameter(1.0 + SCALE_STD * torch.randn(experts, streams, dim))

    def forward(self, x_BLSd: Tensor, time_BLt: Tensor) -> Tensor:
        """`[B, L, S, d]` to the same shape, given embeddings of the times `[B, L, width]`."""
        gate_BLK = self.gate(time_BLt).softmax(-1)
        scaled_BLSd: Tensor = x_BLSd * torch.einsum("blk,ksd->blsd", gate_BLK, self.scale)
        return scaled_BLSd
