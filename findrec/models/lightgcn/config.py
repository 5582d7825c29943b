"""Configuration of LightGCN."""

from __future__ import annotations

from typing import ClassVar, Literal

from pydantic import Field

from findrec.models.config import ModelConfig


class LightGCNConfig(ModelConfig):
    """The propagation and the pairwise loss."""

    implementation: ClassVar[str] = "findrec.models.lightgcn.model:LightGCN"
    scorer: ClassVar[str] = "findrec.evaluation.scoring.user_item:UserItemScorer"

    name: Literal["lightgcn"] = "lightgcn"
    layers: int = Field(3, ge=1)  # of propagation
    negatives: int = Field(1, ge=1)  # items per user-item pair
    l2: float = Field(1e-4, ge=0)  # penalty on the rows of a pair and its negatives
