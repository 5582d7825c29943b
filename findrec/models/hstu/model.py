"""HSTU: hierarchical sequential transduction units over item ids (Zhai et al. 2024, arXiv 2402.17152).

README.md in this folder says what is the paper's and what differs.

Shape letters: B users, L steps, T target positions, n items, d width.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from findrec.datasets.batches.batch import Batch
from findrec.datasets.folder.features import ModalRows
from findrec.errors import FindRecError
from findrec.models.base import DataFacts
from findrec.models.history_model import HistoryModel
from findrec.models.hstu.config import HSTUConfig
from findrec.models.hstu.layers import HSTULayer, Relations
from findrec.models.parts.cosine import CosineQueries, unit_vectors
from findrec.models.parts.transformer import INIT_STD, LearnedPositions, check_heads


class HSTU(HistoryModel):
    """HSTU layers over item ids; modalities are ignored."""

    Config = HSTUConfig

    def add_layers(self, facts: DataFacts) -> None:
        """See `HistoryModel`; raises `FindRecError` if the heads do not divide the width."""
        config: HSTUConfig = self.config
        check_heads(config.dim, config.heads, "model.heads")
        self.position = LearnedPositions(facts.max_length, config.dim)
        nn.init.normal_(self.position.weight, std=INIT_STD)
        self.layers = nn.ModuleList(
            [
                HSTULayer(
                    config.dim, config.heads, facts.max_length, config.dropout, times=config.times != "none"
                )
                for _ in range(config.layers)
            ]
        )
        self.content_scores = config.temperature is not None

    def make_norm(self) -> nn.Module:
        """See `HistoryModel`."""
        temperature = self.config.temperature
        return super().make_norm() if temperature is None else CosineQueries(temperature)

    @property
    def longest_history(self) -> int:
        """See `findrec.models.capabilities.LimitedHistory`: the number of learned positions."""
        return self.position.num_embeddings

    def encode(self, x_BLd: Tensor, batch: Batch) -> Tensor:
        """See `HistoryModel`; raises `FindRecError` for longer histories, or without the times it reads."""
        length = x_BLd.shape[1]
        x_BLd = self.inputs.drop(x_BLd + self.position(length))
        relations = Relations.of(length, x_BLd.device, *self._times(batch))
        for layer in self.layers:
            x_BLd = self.run_layer(layer, x_BLd, relations)
        return x_BLd

    def _times(self, batch: Batch) -> tuple[Tensor | None, Tensor | None]:
        """The times `[B, L]` (s) of the attended events and of those that attend; None if not read."""
        times = self.config.times
        if times == "none":
            return None, None
        if batch.time is None or (times == "target" and batch.query_time is None):
            raise FindRecError(
                f"model.times={times} needs the times of events and predictions, which this batch lacks; "
                "set model.times=none"
            )
        if times == "past":
            return batch.time, batch.time
        # An event attends at the time of the next one, which is when the prediction is made.
        assert batch.query_time is not None
        next_BL = torch.cat([batch.time[:, 1:], batch.time[:, -1:]], dim=1).flatten()
        return batch.time, next_BL.index_copy(0, batch.position, batch.query_time).view_as(batch.time)

    def item_transform(self, rows: Tensor, features: Mapping[str, ModalRows]) -> Tensor:
        """See `SequenceModel`."""
        return unit_vectors(rows) if self.content_scores else rows
