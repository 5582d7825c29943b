"""UniSRec on one data set: adapted text features, with or without ids, under a Transformer.

Hou et al. 2022, arXiv 2206.05941.
README.md in this folder says what is the paper's and what differs.

Shape letters: B users, L steps, T target positions, n items, d width.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from findrec.datasets.batches.batch import Batch
from findrec.datasets.folder.features import ModalRows
from findrec.models.base import DataFacts
from findrec.models.history_model import HistoryModel
from findrec.models.parts.cosine import CosineQueries, unit_vectors
from findrec.models.parts.stream_config import StreamConfig
from findrec.models.parts.streams import TransformerStream
from findrec.models.parts.transformer import check_heads
from findrec.models.unisrec.adaptor import Adaptor
from findrec.models.unisrec.config import UniSRecConfig


class UniSRec(HistoryModel):
    """A Transformer over vectors of adapted features plus ids. Without features it uses ids only."""

    Config = UniSRecConfig

    def add_layers(self, facts: DataFacts) -> None:
        """See `HistoryModel`; raises `FindRecError` if the heads do not divide the width."""
        config: UniSRecConfig = self.config
        check_heads(config.dim, config.heads, "model.heads")
        layers = StreamConfig(kind="transformer", layers=config.layers, heads=config.heads)
        self.stream = TransformerStream(config.dim, config.dropout, layers, facts.max_length)
        self.adaptors = nn.ModuleDict(
            {
                name: Adaptor(width, config.dim, config.experts, config.adaptor_dropout)
                for name, width in facts.feature_dims.items()
            }
        )
        self.content_scores = bool(self.adaptors) or config.temperature is not None

    def make_norm(self) -> nn.Module:
        """See `HistoryModel`."""
        temperature = self.config.temperature
        return super().make_norm() if temperature is None else CosineQueries(temperature)

    @property
    def longest_history(self) -> int:
        """See `findrec.models.capabilities.LimitedHistory`: the number of learned positions."""
        return self.stream.position.num_embeddings

    def embed(self, x_items: Tensor, features: Mapping[str, ModalRows]) -> Tensor:
        """See `HistoryModel`; in training with dropout of the features and noise of the gates."""
        return self._vectors(x_items, features, noisy=True)

    def encode(self, x_BLd: Tensor, batch: Batch) -> Tensor:
        """See `HistoryModel`; raises `FindRecError` for a history longer than `longest_history`."""
        encoded: Tensor = self.stream(self.inputs.drop(x_BLd))
        return encoded

    def item_transform(self, rows: Tensor, features: Mapping[str, ModalRows]) -> Tensor:
        """See `SequenceModel`; always without dropout and noise."""
        vectors_nd = self._vectors(rows, features, noisy=False)
        return vectors_nd if self.config.temperature is None else unit_vectors(vectors_nd)

    def _vectors(self, rows_nd: Tensor, features: Mapping[str, ModalRows], *, noisy: bool) -> Tensor:
        # Without ids the rows still take part, with a gradient of zero, as every table is trained.
        vectors_nd = rows_nd if self.config.ids or not self.adaptors else 0.0 * rows_nd
        with torch.autocast(rows_nd.device.type, enabled=False):  # the same vectors are also scored
            for name, adaptor in self.adaptors.items():
                vectors_nd = vectors_nd + adaptor(features[name], noisy=noisy)
        return vectors_nd
