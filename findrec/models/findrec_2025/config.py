"""Configuration of FindRec: the sequence stream, the alignment of modalities, the expert routing."""

from __future__ import annotations

from collections.abc import Sequence
from typing import ClassVar, Literal

from pydantic import Field

from findrec.models.config import SequenceConfig
from findrec.models.parts.stream_config import StreamConfig
from findrec.schema import Part, may_change


class AlignConfig(Part):
    """Alignment of each modality's latents to the ID stream (arXiv 2507.04651, section 4.1)."""

    # mmd: a control. legacy: the incorrect term of the public code, for comparison.
    kind: Literal["stein", "mmd", "legacy", "none"] = "stein"
    score: Literal["gaussian", "kde"] = "gaussian"
    kernel: Literal["rbf", "imq"] = "rbf"
    weight: float = Field(0.1, ge=0)
    paired_weight: float = Field(0.0, ge=0)  # InfoNCE between the latent and the ID vector of an item
    paired_temperature: float = Field(0.1, gt=0)
    kl_weight: float = Field(0.01, ge=0)
    free_bits: float = Field(0.05, ge=0)
    rows: int = Field(512, ge=8)  # latents of a microbatch used to estimate the terms
    diagnose_every: int = Field(20, ge=0)  # steps between alignment diagnostics; 0: never


class RoutingConfig(Part):
    """Cross-modal expert routing."""

    kind: Literal["learned", "mean"] = "learned"  # mean: equal gates, no router
    heads: int = Field(4, ge=1)
    window: int = Field(256, ge=0)  # latest events that attention sees, for linear cost; 0: all
    experts: int = Field(4, ge=1)
    temperature: float = Field(1.0, gt=0)
    top_k: int | None = None  # None: dense
    balance_weight: float = may_change("warm_start", 1e-2, ge=0)
    z_weight: float = may_change("warm_start", 1e-3, ge=0)


class ItemsConfig(Part):
    """Item vectors: the id row alone, or with projected modal features added."""

    features: Literal["none", "input", "score", "both"] = "none"  # where features are used
    id_dropout: float = may_change("warm_start", 0.0, ge=0, lt=1)  # share of items whose id row is dropped


class FindRec2025Config(SequenceConfig):
    """Configuration of the network and its ablations."""

    implementation: ClassVar[str] = "findrec.models.findrec_2025.model:FindRec2025"

    name: Literal["findrec-2025"] = "findrec-2025"
    modalities: list[str] | Literal["all"] = "all"
    items: ItemsConfig = ItemsConfig()
    stream: StreamConfig = StreamConfig()
    align: AlignConfig = may_change("warm_start", AlignConfig())
    routing: RoutingConfig = RoutingConfig()

    @property
    def content(self) -> Literal["all"] | Sequence[str]:
        """See `ModelConfig`."""
        return self.modalities

    @property
    def scores_content(self) -> bool:
        """See `ModelConfig`."""
        return self.items.features in ("score", "both")

    @property
    def item_vectors_are_random(self) -> bool:
        """See `ModelConfig`: id rows are dropped at random."""
        return self.items.id_dropout > 0
