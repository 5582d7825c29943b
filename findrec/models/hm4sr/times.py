"""Embeddings of the times of events: the interval since the previous event, and the calendar.

Shape letters: B users, L steps, P periods of the calendar, d width.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from findrec.datasets.batches.batch import Batch
from findrec.errors import FindRecError
from findrec.models.hm4sr.config import TemporalConfig

LARGEST_OCTAVE = 31  # 2^31 s are 68 years
DAY = 86_400
YEAR = 31_556_952  # the mean Gregorian year
# The last one tells early from late within any log: it does not return in less than a lifetime.
PERIODS = (DAY, 7 * DAY, YEAR // 12, YEAR, 100 * YEAR)  # seconds


def interval_index(time_BL: Tensor, length_B: Tensor, per_octave: int) -> Tensor:
    """`[B, L]` int64: `1 + floor(per_octave * log2(1 + seconds))`; 0 for first events and padding.

    Computed in float64, so that the buckets do not depend on the device.
    """
    seconds_BL = (time_BL[:, 1:] - time_BL[:, :-1]).clamp(0, 2**LARGEST_OCTAVE - 1)
    index_BL = 1 + torch.floor(per_octave * torch.log2(1.0 + seconds_BL.double())).long()
    index_BL = torch.cat([torch.zeros_like(time_BL[:, :1]), index_BL], dim=1)
    steps_L = torch.arange(time_BL.shape[1], device=time_BL.device)
    return index_BL * (steps_L < length_B[:, None])


def calendar(time_BL: Tensor) -> Tensor:
    """`[B, L, 2P]` float32: cosine and sine of the time's phase in each of `PERIODS`.

    Phases are taken of integers: a float32 of the seconds since 1970 is only exact to two minutes.
    """
    period_P = torch.tensor(PERIODS, device=time_BL.device)
    turn_BLP = (time_BL[..., None] % period_P).double() / period_P * (2 * torch.pi)
    return torch.cat([turn_BLP.cos(), turn_BLP.sin()], dim=-1).float()


class TimeEmbedding(nn.Module):
    """The embedding `[B, L, width]` of the time of each event."""

    def __init__(self, dim: int, config: TemporalConfig) -> None:
        super().__init__()
        self.per_octave = config.per_octave
        self.interval = self.calendar = None
        if config.reads != "calendar":
            self.interval = nn.Embedding(2 + LARGEST_OCTAVE * config.per_octave, dim)
        if config.reads != "interval":
            self.calendar = nn.Linear(2 * len(PERIODS), dim)
        self.width = dim * (2 if config.reads == "both" else 1)

    def forward(self, batch: Batch) -> Tensor:
        """Raises `FindRecError` for a batch without times."""
        if batch.time is None:
            raise FindRecError(
                "model.temporal reads the times of events, but the batch has none; set "
                "model.temporal.experts=0, or build batches with times (Batch.time)"
            )
        parts = []
        if self.interval is not None:
            index_BL = interval_index(batch.time, batch.length, self.per_octave)
            parts.append(self.interval(index_BL))
        if self.calendar is not None:
            parts.append(self.calendar(calendar(batch.time)))
        return torch.cat(parts, dim=-1)
