"""Configuration of VBPR."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from typing import ClassVar, Literal

from pydantic import Field

from findrec.models.config import ModelConfig


class VBPRConfig(ModelConfig):
    """The widths and the pairwise loss; without modalities it is matrix factorisation by BPR.

    `dim` is the width of the factors of ids.
    """

    implementation: ClassVar[str] = "findrec.models.vbpr.model:VBPR"
    scorer: ClassVar[str] = "findrec.evaluation.scoring.user_item:UserItemScorer"

    name: Literal["vbpr"] = "vbpr"
    modalities: list[str] | Literal["all"] = "all"
    content_dim: int = Field(64, ge=1)  # width of the factors of content, to which features are projected
    negatives: int = Field(1, ge=1)  # items per user-item pair
    l2: float = Field(1e-3, ge=0)  # penalty on the rows of a pair and its negatives

    @property
    def content(self) -> Literal["all"] | Sequence[str]:
        """See `ModelConfig`."""
        return self.modalities

    def vector_dim(self, modalities: Collection[str]) -> int:
        """See `ModelConfig`: factors of ids and of content, and the bias of the item."""
        return self.dim + 1 + (self.content_dim if modalities else 0)

    @property
    def scores_content(self) -> bool:
        """See `ModelConfig`."""
        return True
