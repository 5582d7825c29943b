"""Configuration of FindRec: the sequence stream, the alignment of content, the control of content."""

from __future__ import annotations

from collections.abc import Sequence
from typing import ClassVar, Literal

from pydantic import Field

from findrec.models.config import SequenceConfig
from findrec.models.parts.stream_config import StreamConfig
from findrec.schema import Part, may_change


class AlignConfig(Part):
    """Alignment of what an item's row remembers of its content with its content (see `alignment.py`)."""

    # conditional: item by item. marginal: the Stein discrepancy between the two clouds of vectors. mmd: their
    # maximum mean discrepancy. The last two, and none, are ablations.
    kind: Literal["conditional", "marginal", "mmd", "none"] = "conditional"
    weight: float = Field(1.0, ge=0)
    rows: int = Field(512, ge=8)  # items of a microbatch used for marginal, mmd and the diagnostics
    diagnose_every: int = Field(20, ge=0)  # steps between alignment diagnostics; 0: never


class ControlConfig(Part):
    """Control of content: how far to trust it, and what training shows of it (see `items.py`, `views.py`)."""

    # learned: by the agreement with what the row remembers. open: content is always trusted (an ablation).
    gates: Literal["learned", "open"] = "learned"
    weight: float = Field(1.0, ge=0)  # of the loss that teaches the gates to detect wrong content
    # Training inputs: in this share of the microbatches, up to that share of the items have wrong content.
    altered: float = Field(0.5, ge=0, le=1)
    swapped: float = Field(0.5, ge=0, le=1)
    hide_id: float = Field(0.05, ge=0, lt=1)  # share of items shown by content only
    hide_content: float = Field(0.05, ge=0, lt=1)  # share of items shown by their row only


class FindRecConfig(SequenceConfig):
    """Configuration of the network and its ablations."""

    implementation: ClassVar[str] = "findrec.models.findrec.model:FindRec"

    name: Literal["findrec"] = "findrec"
    modalities: list[str] | Literal["all"] = "all"
    stream: StreamConfig = StreamConfig()
    align: AlignConfig = may_change("warm_start", AlignConfig())
    control: ControlConfig = may_change("warm_start", ControlConfig())

    @property
    def content(self) -> Literal["all"] | Sequence[str]:
        """See `ModelConfig`."""
        return self.modalities

    @property
    def scores_content(self) -> bool:
        """See `ModelConfig`: wherever there are features, items are scored by them too."""
        return True
