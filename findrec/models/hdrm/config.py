"""Configuration of HDRM: the hyperbolic encoder, the diffusion of users, and its ablations."""

from __future__ import annotations

from typing import ClassVar, Literal

from pydantic import Field, model_validator

from findrec.models.config import ModelConfig, StageSpec
from findrec.models.parts.hyperbolic_config import HyperbolicGraphConfig
from findrec.schema import Part

ENCODER = "encoder"  # name of the first stage
_ENCODER_MODEL = "findrec.models.hdrm.encoder:Encoder"


class EncoderStage(HyperbolicGraphConfig):
    """The model of the first stage, which is no registered model but named by its import path."""

    implementation: ClassVar[str] = _ENCODER_MODEL

    name: str = _ENCODER_MODEL


class EncoderConfig(Part):
    """The first stage: a hyperbolic graph convolution, which the second stage does not change."""

    layers: int = Field(3, ge=1)  # hops of the graph convolution
    margin: float = Field(0.1, gt=0)  # between squared distances to items of the user and to other items
    negatives: int = Field(1, ge=1)  # sampled items per user-item pair
    epochs: int = Field(30, ge=1)  # of this stage; training.epochs is for the second one
    lr: float = Field(5e-3, gt=0)  # of this stage; training.optim.lr is for the second one


class DiffusionConfig(Part):
    """The diffusion of user vectors (see `diffusion.py`)."""

    steps: int = Field(50, ge=2)  # noise levels in training
    sampling_steps: int = Field(10, ge=1)  # evaluations of the denoiser per user
    last_signal: float = Field(
        0.01, gt=0, lt=1
    )  # share of the variance that is left of a vector at the last step
    # directed: noise has the sign of the vector in each coordinate, and the mean and deviation of the data.
    # isotropic: standard normal noise (an ablation).
    noise: Literal["directed", "isotropic"] = "directed"
    radial: float = Field(
        0.1, ge=0
    )  # outward drift that preserves the distance from the origin; 0: none (an ablation)
    hidden: int = Field(256, ge=8)  # width of the denoiser
    drop_condition: float = Field(
        0.1, ge=0, lt=1
    )  # share of training pairs without the history as a condition
    guidance: float = Field(0.0, ge=0)  # strength of classifier-free guidance in sampling
    snr_limit: float = Field(5.0, gt=0)  # signal-to-noise ratio from which the reconstruction has full weight

    @model_validator(mode="after")
    def _check(self) -> DiffusionConfig:
        if self.sampling_steps > self.steps:
            raise ValueError(
                f"sampling_steps={self.sampling_steps} is more than steps={self.steps}: there are no other "
                "noise levels to evaluate; lower sampling_steps"
            )
        return self


class HDRMConfig(ModelConfig):
    """Both stages; `dim` counts the time-like coordinate, so tangent vectors are narrower by one."""

    implementation: ClassVar[str] = "findrec.models.hdrm.model:HDRM"
    scorer: ClassVar[str] = "findrec.evaluation.scoring.user_item:UserItemScorer"

    name: Literal["hdrm"] = "hdrm"
    encoder: EncoderConfig = EncoderConfig()
    diffusion: DiffusionConfig = DiffusionConfig()
    mix: float = Field(
        0.3, ge=0, le=1
    )  # share of the diffused vector in a user's vector; 0: the encoder alone
    margin: float = Field(0.1, gt=0)  # of the ranking loss of the second stage
    negatives: int = Field(1, ge=1)  # sampled items per user-item pair in the second stage
    reconstruction: float = Field(
        0.3, ge=0, le=1
    )  # share of the reconstruction in the loss; ranking has the rest

    def stages(self) -> tuple[StageSpec, ...]:
        """See `ModelConfig`."""
        encoder = EncoderStage(dim=self.dim, **self.encoder.model_dump(exclude={"epochs", "lr"}))
        training = {"epochs": self.encoder.epochs, "optim": {"lr": self.encoder.lr}}
        first = StageSpec(ENCODER, encoder, training=training)
        return first, StageSpec("", self, needs=(ENCODER,))
