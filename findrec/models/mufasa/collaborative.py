"""The first stage: item vectors from co-consumption in the training events, without content.

A continuous bag of words (Mikolov et al. 2013; item2vec, Barkan & Koenigstein 2016) with one table for both
sides and the softmax over the catalogue: the mean of the latest items predicts the next one,

    p(j | i_1 .. i_w) = softmax_j ( LN(mean of e_i) . e_j ).

Shape letters: B users, L padded length, T target positions, U distinct items, d width.
"""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor
from torch.nn import functional as F

from findrec.datasets.batches.batch import Batch
from findrec.datasets.folder.features import ModalRows
from findrec.models.base import DataFacts, Out, SequenceModel
from findrec.models.mufasa.config import CollaborativeStageConfig
from findrec.models.parts.layers import gather_positions


class Collaborative(SequenceModel):
    """Has no weights besides the item table, whose rows are read by the next stage."""

    Config = CollaborativeStageConfig

    def __init__(self, config: CollaborativeStageConfig, facts: DataFacts) -> None:
        super().__init__()
        self.config = config

    def forward(self, batch: Batch, x_items: Tensor, features: Mapping[str, ModalRows]) -> Out:
        """See `SequenceModel`: the direction of the mean of the latest `reach` items."""
        total_BLd = F.embedding(batch.index, x_items).cumsum(1)
        older_BLd = F.pad(total_BLd, (0, 0, self.config.reach, 0))[:, : total_BLd.shape[1]]
        # A multiple of the mean: normalised below. Rows are small, so the normalisation adds nothing to them.
        mean_Td = gather_positions(total_BLd - older_BLd, batch)
        return Out(F.layer_norm(mean_Td, mean_Td.shape[1:], eps=1e-12))
