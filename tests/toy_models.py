"""Small user models, named by import path (`toy_models:...`), that learn the planted data.

There is one for each kind of examples, one of two stages, and one for each way to rank items.
"""

from __future__ import annotations

import os
import signal
from collections.abc import Mapping
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.nn import functional as F

from findrec.config import RunConfig
from findrec.datasets.batches.batch import Batch
from findrec.datasets.batches.edges import EdgeExamples, Edges
from findrec.datasets.batches.history_candidates import CandidateExamples, Candidates
from findrec.datasets.batches.single_items import ItemExamples, ItemIds
from findrec.datasets.folder.data_folder import DataFolder
from findrec.datasets.folder.features import ModalRows
from findrec.evaluation.scoring.blocks import BlockScorer
from findrec.evaluation.scoring.users import UserBlock
from findrec.models.base import DataFacts, Microbatch, Model, Out, SequenceModel, StepLoss, TableShape
from findrec.models.capabilities import UserItemVectors
from findrec.models.config import ModelConfig, StageSpec
from findrec.models.configs import choose_model
from findrec.models.parts.layers import gather_positions
from findrec.tables.base import ITEMS, USERS
from findrec.tables.view import Tables
from findrec.training.checkpoints.checkpoint import load_checkpoint

KILL_FILE = "TOY_KILL_FILE"  # variable: the worker that can delete this file kills itself


class StageConfig(ModelConfig):
    """Of a stage that only prepares something."""

    ranked = False

    negatives: int = 2


class TextConfig(StageConfig):
    """Of a stage that reads the text features of items."""

    @property
    def content(self) -> tuple[str, ...]:
        return ("text",)


class TwoTables(Model[Edges]):
    """Matrix factorisation by BPR: rows of users and of items, and no weights beside them."""

    Config = StageConfig

    def __init__(self, config: StageConfig, facts: DataFacts) -> None:
        super().__init__()
        self.config = config

    @classmethod
    def examples(cls, config: RunConfig, folder: DataFolder) -> EdgeExamples:
        assert isinstance(config.model, StageConfig)
        return EdgeExamples(config, folder, negatives=config.model.negatives)

    @classmethod
    def tables(cls, config: Any, facts: DataFacts) -> dict[str, TableShape]:
        return {
            ITEMS: TableShape(facts.num_items, config.dim),
            USERS: TableShape(facts.num_users, config.dim),
        }

    def loss(self, microbatch: Microbatch[Edges], tables: Tables) -> StepLoss:
        edges = microbatch.examples
        user_nd = tables[USERS].embed(edges.user)
        item_nNd = tables[ITEMS].embed(torch.cat([edges.item[:, None], edges.negative], dim=1))
        score_nN = (user_nd[:, None] * item_nNd).sum(-1)
        loss = F.softplus(score_nN[:, 1:] - score_nN[:, :1]).mean(1).sum() / microbatch.num_targets
        return StepLoss(loss, loss.detach())


class ReadsText(Model[ItemIds]):
    """A linear map from the rows of items to their text features; there is no table but that of items."""

    Config = TextConfig

    def __init__(self, config: TextConfig, facts: DataFacts) -> None:
        super().__init__()
        self.config = config
        self.project = nn.Linear(config.dim, facts.feature_dims["text"])

    @classmethod
    def examples(cls, config: RunConfig, folder: DataFolder) -> ItemExamples:
        return ItemExamples(config, folder)

    def loss(self, microbatch: Microbatch[ItemIds], tables: Tables) -> StepLoss:
        items = microbatch.examples.item
        text = microbatch.features.features(items)["text"]
        error_n = (self.project(tables[ITEMS].embed(items)) - text.values).square().mean(1)
        loss = (error_n * text.present).sum() / microbatch.num_targets
        return StepLoss(loss, loss.detach())


class RankedUsersConfig(StageConfig):
    """Of a model with a vector for each user."""

    ranked = True
    scorer: ClassVar[str] = "findrec.evaluation.scoring.user_item:UserItemScorer"


class RankedUsers(TwoTables):
    """Ranks by rows of users and of items; a visitor gets the mean of the rows of its items, reversed."""

    Config = RankedUsersConfig

    def __init__(self, config: StageConfig, facts: DataFacts) -> None:
        super().__init__(config, facts)
        self.graph = facts.interaction_graph()

    def user_item_vectors(self, tables: Mapping[str, Tensor], features: Any) -> UserItemVectors:
        def fold_in(total_Be: Tensor, count_B: Tensor) -> Tensor:
            return total_Be.flip(1) / count_B.clamp(min=1)[:, None]

        known_U = self.graph.user_degree > 0
        return UserItemVectors(tables[USERS], tables[ITEMS], known_U, tables[ITEMS], fold_in)


class Judge(Model[Candidates]):
    """Whether a candidate follows a history, from its row and that of the last event."""

    Config = StageConfig

    def __init__(self, config: StageConfig, facts: DataFacts) -> None:
        super().__init__()
        self.config = config
        self.follow = nn.Linear(config.dim, config.dim)

    @classmethod
    def examples(cls, config: RunConfig, folder: DataFolder) -> CandidateExamples:
        assert isinstance(config.model, StageConfig)
        return CandidateExamples(config, folder, negatives=config.model.negatives)

    def loss(self, microbatch: Microbatch[Candidates], tables: Tables) -> StepLoss:
        examples = microbatch.examples
        last = examples.history.item.flatten()[examples.history.position]
        last_nd, candidate_nd = tables[ITEMS].embed(torch.stack([last, examples.candidate]))
        logit_n = (self.follow(last_nd) * candidate_nd).sum(1)
        loss = F.binary_cross_entropy_with_logits(logit_n, examples.label, reduction="sum")
        loss = loss / microbatch.num_targets
        return StepLoss(loss, loss.detach())


class NoTables(Model[ItemIds]):
    """A stage whose weights are all in the tower: the mean of the text features."""

    Config = TextConfig

    def __init__(self, config: TextConfig, facts: DataFacts) -> None:
        super().__init__()
        self.config = config
        self.mean = nn.Parameter(torch.zeros(facts.feature_dims["text"]))

    @classmethod
    def examples(cls, config: RunConfig, folder: DataFolder) -> ItemExamples:
        return ItemExamples(config, folder)

    @classmethod
    def tables(cls, config: Any, facts: DataFacts) -> dict[str, TableShape]:
        return {}

    def loss(self, microbatch: Microbatch[ItemIds], tables: Tables) -> StepLoss:
        text = microbatch.features.features(microbatch.examples.item)["text"]
        error_n = (text.values - self.mean).square().mean(1)
        loss = (error_n * text.present).sum() / microbatch.num_targets
        return StepLoss(loss, loss.detach())


class TwoStagesConfig(ModelConfig):
    """Of a model that is ranked after a stage of edges."""

    stage_epochs: int = 2

    def stages(self) -> tuple[StageSpec, ...]:
        edges = choose_model({"name": "toy_models:TwoTables", "dim": self.dim})
        training = {"epochs": self.stage_epochs}
        return (StageSpec("edges", edges, training=training), StageSpec("", self, needs=("edges",)))


class TwoStages(SequenceModel):
    """What follows the last item, from its row and from the row that the stage `edges` gave it.

    The rows of the stage are not in the checkpoint of this model: they are read from the stage's checkpoint
    wherever the model is built.
    """

    Config = TwoStagesConfig

    prepared_Vd: Tensor

    def __init__(self, config: TwoStagesConfig, facts: DataFacts) -> None:
        super().__init__()
        self.config = config
        rows = torch.zeros(facts.num_items + 1, config.dim)
        if facts.artifacts:  # there are none where the model is only measured
            rows = load_checkpoint(facts.artifacts["edges"]).table["weight"]
        self.register_buffer("prepared_Vd", rows, persistent=False)
        self.follow = nn.Linear(2 * config.dim, config.dim)

    def start_step(self, step: int) -> None:
        kill_file = os.environ.get(KILL_FILE)
        if step == 3 and kill_file is not None:
            try:
                Path(kill_file).unlink()
            except FileNotFoundError:
                return
            os.kill(os.getpid(), signal.SIGKILL)

    def forward(self, batch: Batch, x_items: Tensor, features: Mapping[str, ModalRows]) -> Out:
        x_BLd = torch.cat([x_items[batch.index], self.prepared_Vd[batch.item]], dim=2)
        return Out(self.follow(gather_positions(x_BLd, batch)))


class ContinuedConfig(ModelConfig):
    """Of a model whose second stage goes on from the first."""

    def stages(self) -> tuple[StageSpec, ...]:
        training = {"epochs": 2, "optim": {"lr": 0.005}}
        first = StageSpec("first", self, training=training)
        return (first, StageSpec("", self, needs=("first",), continues="first"))


class Continued(SequenceModel):
    """A linear map of the last item's row."""

    Config = ContinuedConfig

    def __init__(self, config: ContinuedConfig, facts: DataFacts) -> None:
        super().__init__()
        self.config = config
        self.follow = nn.Linear(config.dim, config.dim)

    def forward(self, batch: Batch, x_items: Tensor, features: Mapping[str, ModalRows]) -> Out:
        return Out(self.follow(gather_positions(x_items[batch.index], batch)))


class TwoInterests(SequenceModel):
    """Two vectors per user, ranked by the larger inner product and trained by their mean."""

    Config = ModelConfig

    def __init__(self, config: ModelConfig, facts: DataFacts) -> None:
        super().__init__()
        self.config = config
        self.follow = nn.Linear(config.dim, 2 * config.dim)

    def forward(self, batch: Batch, x_items: Tensor, features: Mapping[str, ModalRows]) -> Out:
        h_TKd = self.follow(gather_positions(x_items[batch.index], batch)).unflatten(1, (2, -1))
        return Out(h_TKd.mean(1) if self.training else h_TKd)


class DistanceConfig(ModelConfig):
    """Of a model whose scores are no inner products."""

    scorer: ClassVar[str] = "toy_models:DistanceScorer"


class Distance(SequenceModel):
    """A linear map of the last item's row, ranked by the negative distance to the rows of items."""

    Config = DistanceConfig

    def __init__(self, config: DistanceConfig, facts: DataFacts) -> None:
        super().__init__()
        self.config = config
        self.follow = nn.Linear(config.dim, config.dim)

    def forward(self, batch: Batch, x_items: Tensor, features: Mapping[str, ModalRows]) -> Out:
        return Out(self.follow(gather_positions(x_items[batch.index], batch)))


class DistanceScorer(BlockScorer):
    """Scores blocks of items for `Distance`; equal scores are ties."""

    def __init__(
        self, model: Distance, weight: Tensor, catalogue: Any, max_length: int, device: Any, *, name: str
    ) -> None:
        self.name, self.popularity = name, np.zeros(len(weight), dtype=np.int64)
        self.model, self.rows_Vd = model.eval(), weight.detach()

    @torch.no_grad()
    def score_block(self, block: UserBlock, lo: int, hi: int) -> NDArray[np.float64]:
        h_Bd = self.model(block.batch, self.rows_Vd[block.batch.ids], {}).h
        return -torch.cdist(h_Bd.double(), self.rows_Vd[lo:hi].double()).numpy()


class ShortListsConfig(ModelConfig):
    """Of a model ranked by lists that are too short for validation."""

    scorer: ClassVar[str] = "toy_models:ShortLists"


class ShortListsModel(Distance):
    """A model that cannot be validated."""

    Config = ShortListsConfig  # type: ignore[assignment]


class ShortLists(DistanceScorer):
    """Lists of nine items."""

    list_limit = 9
