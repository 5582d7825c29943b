"""Streaming inference with this model: the cache of its attention, beside the state of the stream.

With `model.routing.window=0` attention sees all events, so memory and cost grow with them; otherwise the cost
of an event does not depend on the length of the history.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor
from torch.nn import functional as F

from findrec.datasets.batches.batch import Batch
from findrec.datasets.batches.catalogue import ItemFeatures
from findrec.models.parts.repeat import REPEAT_WINDOW
from findrec.models.parts.streaming import StreamingModel, UserState

if TYPE_CHECKING:
    from findrec.models.findrec_2025.model import FindRec2025


class StreamingFindRec2025(StreamingModel):
    """A trained model with its item table, one user at a time."""

    def __init__(
        self,
        model: FindRec2025,
        table_weight: Tensor,
        catalogue: ItemFeatures,
        repeat_window: int = REPEAT_WINDOW,
    ) -> None:
        """See `StreamingModel`."""
        super().__init__(model, table_weight, catalogue, repeat_window)
        self._encoders, self._control = model.encoders, model.control

    def _latents(self, batch: Batch) -> list[Tensor]:
        """The latents `[1, L, d]` of each modality."""
        features = self._catalogue.features(batch.ids)
        latents = [encoder(features[name]).z_Ud for name, encoder in self._encoders.items()]
        return [F.embedding(batch.index, z_Ud) for z_Ud in latents]

    def _open(self, state: UserState, batch: Batch) -> None:
        stream_1Ld, state.stream = self._stream.prefill(self._inputs(batch), batch.length)
        if self._control is not None:
            state.cache = self._control.prefill(stream_1Ld, self._latents(batch))

    def _advance(self, state: UserState, batch: Batch) -> Tensor:
        vector_1d = super()._advance(state, batch)
        if self._control is not None and state.cache is not None:
            z_M1d = torch.cat(self._latents(batch))
            correction_1d, state.cache = self._control.step(vector_1d, z_M1d, state.cache)
            vector_1d = vector_1d + correction_1d
        return vector_1d
