"""The auxiliary tasks of HM4SR besides the two contrasts, which are `info_nce`.

Shape letters: B users, L steps, U distinct items, C categories, S streams, d width of a stream.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from findrec.datasets.batches.batch import Batch
from findrec.datasets.folder.features import ModalRows
from findrec.devices import copy_to


class CategoryPrediction(nn.Module):
    """Predicts the categories of the items of the histories from the vectors they enter with.

    The binary cross-entropy, a mean over categories and over events whose item has categories. An item has
    category c if its feature c is not zero.
    """

    def __init__(self, width: int, num_categories: int) -> None:
        super().__init__()
        self.predict = nn.Linear(width, num_categories)

    def forward(self, x_USd: Tensor, categories: ModalRows, batch: Batch) -> Tensor:
        """The loss `[]` in float32, of item vectors `[U, S, d]`."""
        with torch.autocast(x_USd.device.type, enabled=False):
            logit_UC = self.predict(x_USd.float().flatten(1))
            wanted_UC = (categories.values != 0).to(logit_UC.dtype)
            loss_U = F.binary_cross_entropy_with_logits(logit_UC, wanted_UC, reduction="none").mean(1)
            # Item 0 is the padding, whose feature is missing.
            events_U = torch.bincount(batch.index.flatten(), minlength=len(loss_U)) * categories.present
            loss: Tensor = (loss_U @ events_U.to(loss_U.dtype)) / events_U.sum().clamp(min=1)
            return loss


class TimePlaceholders(nn.Module):
    """Replaces the content of some events by a map of their time, `P_s t`, for the streams of content."""

    def __init__(self, dim: int, streams: int, time_width: int, share: float) -> None:
        """`streams` counts those of content."""
        super().__init__()
        self.share, self.streams = share, streams
        self.from_time = nn.Linear(time_width, streams * dim)

    def forward(self, x_BLSd: Tensor, time_BLt: Tensor) -> Tensor:
        """`[B, L, S, d]` of content to the same shape; each event is replaced with probability `share`."""
        placeholder_BLSd = self.from_time(time_BLt).unflatten(2, (self.streams, -1))
        replaced_BL = copy_to(torch.rand(x_BLSd.shape[:2]) < self.share, x_BLSd.device)
        return torch.where(replaced_BL[..., None, None], placeholder_BLSd, x_BLSd)
