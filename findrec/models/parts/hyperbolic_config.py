"""Configuration of models that learn points of the hyperboloid for users and items."""

from __future__ import annotations

from typing import ClassVar

from pydantic import Field

from findrec.models.config import ModelConfig


class HyperbolicGraphConfig(ModelConfig):
    """Keys of the graph convolution in the tangent space, and of its ranking loss."""

    scorer: ClassVar[str] = "findrec.evaluation.scoring.user_item:UserItemScorer"

    layers: int = Field(3, ge=1)  # hops of the graph convolution
    # Squared distances to items of the user should be smaller by this than those to other items.
    margin: float = Field(0.1, gt=0)
    negatives: int = Field(1, ge=1)  # sampled items per user-item pair
