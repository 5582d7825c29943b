"""MFN's attention: frozen content attends, ids answer (Xie et al. 2021, arXiv 2112.02591).

README.md in this folder says what else MFN consists of. Shape letters: B users, L steps, T target positions,
d width.
"""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor, nn

from findrec.datasets.batches.batch import Batch
from findrec.datasets.folder.features import ModalRows
from findrec.errors import FindRecError
from findrec.models.base import DataFacts, Out, SequenceModel
from findrec.models.mfn.attention import Guide, GuidedBlock
from findrec.models.mfn.config import MFNConfig
from findrec.models.parts.layers import Inputs, WaitTimeModulation, gather_positions
from findrec.models.parts.repeat import RepeatHead


class MFN(SequenceModel):
    """A causal Transformer over ids whose attention weights come from content."""

    Config = MFNConfig

    def __init__(self, config: MFNConfig, facts: DataFacts) -> None:
        """Raises `FindRecError` if the data have no content to attend by."""
        super().__init__()
        self.config = config
        dims = {} if config.attend == "ids" else facts.feature_dims
        if config.attend != "ids" and not dims:
            raise FindRecError(
                f"model.attend={config.attend} needs content to attend by, but there are no features: add "
                "some with `findrec features`, or set model.attend=ids"
            )
        self.inputs = Inputs(
            config.dim, config.dropout, gaps=config.gaps, num_event_types=facts.num_event_types
        )
        self.guide = Guide(dims, config.dim, facts.max_length)
        self.blocks = nn.ModuleList(
            [
                GuidedBlock(config.dim, config.heads, config.dropout, ids=config.attend != "content")
                for _ in range(config.layers)
            ]
        )
        self.norm = nn.LayerNorm(config.dim)
        self.moment = WaitTimeModulation(config.dim) if config.wait else None
        self.repeat_head = RepeatHead(config.dim) if config.repeat else None

    @property
    def longest_history(self) -> int:
        """See `findrec.models.capabilities.LimitedHistory`: the number of learned positions."""
        return self.guide.position.num_embeddings

    def forward(self, batch: Batch, x_items: Tensor, features: Mapping[str, ModalRows]) -> Out:
        """See `SequenceModel`; raises `FindRecError` for a history longer than `max_length`."""
        guide_BLd = self.guide(batch, features)
        x_BLd = self.inputs.drop(self.inputs(batch, x_items))
        for block in self.blocks:
            x_BLd = self.run_layer(block, x_BLd, guide_BLd)
        h_Td = gather_positions(x_BLd, batch)
        if self.moment is not None:
            h_Td = self.moment(h_Td, batch)
        h_Td = self.norm(h_Td)
        return Out(h_Td, None if self.repeat_head is None else self.repeat_head(h_Td))
