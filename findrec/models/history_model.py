"""Base classes of models over the item ids of histories: everything but the layers of the model.

Shape letters: B users, L padded length, T target positions, U distinct items, d width of the item table.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Mapping

from torch import Tensor, nn

from findrec.datasets.batches.batch import Batch
from findrec.datasets.batches.catalogue import ItemFeatures
from findrec.datasets.folder.features import ModalRows
from findrec.models.base import DataFacts, Out, SequenceModel
from findrec.models.config import SequenceConfig
from findrec.models.parts.layers import Inputs, WaitTimeModulation, gather_positions
from findrec.models.parts.repeat import RepeatHead
from findrec.models.parts.streaming import StreamingModel


class HistoryModel(SequenceModel):
    """Inputs of the events, the layers of a subclass, and user vectors at the target positions.

    The inputs and outputs that all sequence models share
    (`SequenceConfig`) are added here; a subclass creates its layers in `add_layers` and runs them in
    `encode`.
    """

    def __init__(self, config: SequenceConfig, facts: DataFacts) -> None:
        super().__init__()
        self.config = config
        self.inputs = Inputs(
            config.dim, config.dropout, gaps=config.gaps, num_event_types=facts.num_event_types
        )
        self.add_layers(facts)
        self.norm = self.make_norm()
        # `moment` is part of the checkpoint format.
        self.moment = WaitTimeModulation(config.dim) if config.wait else None
        self.repeat_head = RepeatHead(config.dim) if config.repeat else None

    @abstractmethod
    def add_layers(self, facts: DataFacts) -> None:
        """Create the layers; called once by the constructor, when `config` and `inputs` exist."""

    @abstractmethod
    def encode(self, x_BLd: Tensor, batch: Batch) -> Tensor:
        """Outputs `[B, L, d]` of the layers for the inputs `[B, L, d]`, to which dropout was not applied."""

    def make_norm(self) -> nn.Module:
        """The map from outputs of the layers to user vectors; by default a LayerNorm."""
        return nn.LayerNorm(self.config.dim)

    def embed(self, x_items: Tensor, features: Mapping[str, ModalRows]) -> Tensor:
        """The vectors `[U, d]` that items enter the sequence by; by default their table rows."""
        return x_items

    def forward(self, batch: Batch, x_items: Tensor, features: Mapping[str, ModalRows]) -> Out:
        """See `SequenceModel`."""
        x_BLd = self.encode(self.stream_inputs(batch, x_items, features), batch)
        h_Td = self.finish(gather_positions(x_BLd, batch), batch)
        return Out(h_Td, None if self.repeat_head is None else self.repeat_head(h_Td))

    def finish(self, h_Td: Tensor, batch: Batch) -> Tensor:
        """User vectors from the outputs of the layers at the target positions."""
        if self.moment is not None:
            h_Td = self.moment(h_Td, batch)
        normed: Tensor = self.norm(h_Td)
        return normed

    def stream_inputs(self, batch: Batch, rows: Tensor, features: Mapping[str, ModalRows]) -> Tensor:
        """The inputs of the layers `[B, L, d]`, without dropout; arguments as in `forward`."""
        embedded: Tensor = self.inputs(batch, self.embed(rows, features))
        return embedded


class RecurrentModel(HistoryModel):
    """A `HistoryModel` that can stream: `add_layers` sets `stream` to a recurrent stream.

    See `findrec.models.parts.streaming.RecurrentStream`.
    """

    stream: nn.Module

    def encode(self, x_BLd: Tensor, batch: Batch) -> Tensor:
        """See `HistoryModel`."""
        encoded: Tensor = self.stream(self.inputs.drop(x_BLd))
        return encoded

    def open_stream(self, rows_Vd: Tensor, catalogue: ItemFeatures) -> StreamingModel:
        """See `findrec.models.capabilities.Streams`."""
        return StreamingModel(self, rows_Vd, catalogue)
