"""Configuration of MUFASA: the stages that prepare item vectors, and the model of sequences."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, ClassVar, Literal

from pydantic import Field, model_validator

from findrec.models.config import ModelConfig, SequenceConfig, StageSpec
from findrec.schema import Part, may_change

COLLABORATIVE, FUSION, SEQUENCES = "collaborative", "fusion", "sequences"  # names of the stages
MEAN = "mean"  # of all modalities, as anchor
BranchName = Literal["window", "block", "selected"]


class FusionLosses(Part):
    """Losses of the fusion stage (`losses.py`); a weight of 0 leaves a loss out."""

    anchor: float = Field(1.0, ge=0)  # weight of the alignment of modalities and genres with the anchor
    collaborative: float = Field(0.5, ge=0)  # weight of the alignment with co-consumption
    structure: float = Field(0.5, ge=0)  # weight of the similarities of the anchor, and of anti-collapse
    distribution: float = Field(0.1, ge=0)  # weight of the distance from a normal distribution
    temperature: float = Field(0.1, gt=0)  # of the contrastive losses
    structure_temperature: float = Field(0.1, gt=0)  # of the similarities that are compared
    # Weight of negatives of the item's own genre (column category) relative to those of other genres.
    same_genre: float = Field(1.0, ge=0, le=1)
    covariance: float = Field(0.04, ge=0)  # weight of the covariances beside that of the variances
    # How the distribution is compared: sliced Wasserstein distance, maximum mean discrepancy, uniformity.
    distance: Literal["sliced", "mmd", "uniformity"] = "sliced"


class FusionConfig(Part):
    """The fusion layer (`fusion.py`) and its training."""

    dim: int = Field(64, ge=4)  # width of fused vectors
    layers: int = Field(1, ge=1)  # of cross-attention from the anchor to all modalities
    heads: int = Field(4, ge=1)
    drop_modality: float = Field(0.2, ge=0, lt=1)  # share of modalities hidden from items in training
    epochs: int = Field(50, ge=1)  # of the stage, over items
    items: int = Field(256, ge=2)  # of a microbatch of the stage, whose losses compare all pairs of them
    reach: int = Field(3, ge=1)  # events between two items that count as consumed together
    losses: FusionLosses = FusionLosses()

    @model_validator(mode="after")
    def _heads_divide_the_width(self) -> FusionConfig:
        if self.dim % self.heads:
            raise ValueError(
                f"fusion.dim={self.dim} is not a multiple of fusion.heads={self.heads}: each head takes an "
                "equal part of the width; change one of them"
            )
        return self


class SizesConfig(Part):
    """Sizes of the sparse attention in events, see `findrec/ops/sparse_attention/sizes.py`."""

    block: int = Field(32, ge=1)  # length of a compressed block
    stride: int = Field(16, ge=1)  # events from one compressed block to the next
    selected_block: int = Field(32, ge=1)  # length of a block that can be selected
    selected: int = Field(8, ge=1)  # blocks selected for a query
    window: int = Field(64, ge=1)  # latest events
    share: int = Field(32, ge=1)  # consecutive events that share a selection

    @model_validator(mode="after")
    def _sizes_fit(self) -> SizesConfig:
        for name in ("block", "selected_block"):
            if getattr(self, name) % self.stride:
                raise ValueError(
                    f"sizes.{name}={getattr(self, name)} must be a multiple of sizes.stride={self.stride}"
                )
        if self.selected_block % self.share:
            raise ValueError(f"sizes.share={self.share} must divide selected_block={self.selected_block}")
        return self


class AlignmentConfig(Part):
    """Losses beside the next-item prediction (`preference.py`)."""

    preference: float = Field(0.1, ge=0)  # weight of the contrast of users with the items that follow
    temperature: float = Field(0.1, gt=0)  # of that contrast
    consistency: float = Field(0.1, ge=0)  # weight of the agreement of content with the rows of known items


class SequencesConfig(Part):
    """A stage of the sequence model with the frozen fusion layer, before both are trained together."""

    epochs: int = Field(10, ge=1)
    lr: float = Field(1e-3, gt=0)  # of all stages before the joint one, whose rate is training.optim.lr


class MufasaConfig(SequenceConfig):
    """Sizes, losses and ablations of all stages."""

    implementation: ClassVar[str] = "findrec.models.mufasa.model:Mufasa"

    name: Literal["mufasa"] = "mufasa"
    repeat: bool = False
    modalities: list[str] | Literal["all"] = "all"
    anchor: str = "text"  # the modality that others are aligned to: titles; `mean` is that of all modalities
    collaborative_epochs: int = Field(10, ge=1)  # of the stage that learns which items are consumed together
    fusion: FusionConfig = FusionConfig()
    # frozen: fused vectors are constants of the sequence model. tuned: the fusion layer is trained with it.
    tuning: Literal["frozen", "tuned"] = may_change("warm_start", "frozen")
    # With tuning=tuned: a stage before it with the frozen layer; set training.optim.lr to a tenth of its lr.
    sequences: SequencesConfig | None = may_change("warm_start", None)
    layers: int = Field(2, ge=1)
    heads: int = Field(4, ge=1)
    groups: int = Field(2, ge=1)  # of heads that share keys, values and selections
    branches: tuple[BranchName, ...] = ("window", "block", "selected")  # granularities of attention
    sizes: SizesConfig | Literal["auto"] = "auto"  # auto: by data.max_length
    alignment: AlignmentConfig = may_change("warm_start", AlignmentConfig())

    @model_validator(mode="after")
    def _parts_fit(self) -> MufasaConfig:
        if not self.branches or len(set(self.branches)) < len(self.branches):
            raise ValueError(
                f"branches={list(self.branches)} must name at least one of window, block and selected, and "
                "each at most once"
            )
        if self.sequences is not None and self.tuning == "frozen":
            raise ValueError(
                "sequences is a stage before the joint training of all parts: set tuning=tuned, or leave it "
                "out"
            )
        if self.heads % self.groups:
            raise ValueError(f"groups={self.groups} must divide heads={self.heads}")
        if self.dim % (2 * self.heads):
            raise ValueError(
                f"dim={self.dim} must be a multiple of twice heads={self.heads}: each head takes an equal "
                "part of the width, and rotary positions rotate pairs of its elements"
            )
        return self

    @property
    def content(self) -> Literal["all"] | Sequence[str]:
        """See `ModelConfig`."""
        return self.modalities

    @property
    def scores_content(self) -> bool:
        """See `ModelConfig`: items are scored by their fused content too."""
        return True

    @property
    def needs_collaborative(self) -> bool:
        """Whether the fusion stage reads vectors of the collaborative stage."""
        return self.fusion.losses.collaborative > 0

    def stages(self) -> tuple[StageSpec, ...]:
        """See `ModelConfig`: co-consumption, if its loss has a weight; fusion; sequences, maybe twice."""
        fusion = FusionStageConfig(
            dim=self.dim, modalities=self.modalities, anchor=self.anchor, fusion=self.fusion
        )
        rate: dict[str, Any] = {} if self.sequences is None else {"optim": {"lr": self.sequences.lr}}
        before: tuple[StageSpec, ...] = ()
        if self.needs_collaborative:
            first = CollaborativeStageConfig(dim=self.dim, reach=self.fusion.reach)
            training = {"epochs": self.collaborative_epochs} | rate
            before = (StageSpec(COLLABORATIVE, first, training=training),)
        needs = tuple(stage.name for stage in before)
        training = {"epochs": self.fusion.epochs, "tokens": self.fusion.items} | rate
        before += (StageSpec(FUSION, fusion, needs, training=training),)
        if self.sequences is None:
            return (*before, StageSpec("", self, needs=(FUSION,)))
        frozen = self.model_copy(update={"tuning": "frozen", "sequences": None})
        training = {"epochs": self.sequences.epochs} | rate
        return (
            *before,
            StageSpec(SEQUENCES, frozen, needs=(FUSION,), training=training),
            StageSpec("", self, needs=(FUSION, SEQUENCES), continues=SEQUENCES),
        )


class CollaborativeStageConfig(ModelConfig):
    """Of the stage that learns item vectors from co-consumption."""

    implementation: ClassVar[str] = "findrec.models.mufasa.collaborative:Collaborative"
    ranked: ClassVar[bool] = False

    name: str = implementation
    reach: int = Field(3, ge=1)  # latest events that predict the next one


class FusionStageConfig(ModelConfig):
    """Of the stage that learns fused vectors of items."""

    implementation: ClassVar[str] = "findrec.models.mufasa.fusion_stage:FusionStage"
    ranked: ClassVar[bool] = False

    name: str = implementation
    modalities: list[str] | Literal["all"] = "all"
    anchor: str = "text"
    fusion: FusionConfig = FusionConfig()

    @property
    def content(self) -> Literal["all"] | Sequence[str]:
        """See `ModelConfig`."""
        return self.modalities
