"""HDRM: a diffusion of users in the tangent space of a hyperbolic graph encoder.

After "Hyperbolic Diffusion Recommender Model" (WWW 2025, arXiv 2504.01541); see README.md for the equations
and for what differs.

Shape letters: U, V rows of the tables of users and items, B users, n edges, d width of tangent vectors.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from findrec.config import RunConfig
from findrec.datasets.batches.catalogue import ItemFeatures
from findrec.datasets.batches.edges import EdgeExamples, Edges
from findrec.datasets.folder.data_folder import DataFolder
from findrec.models.base import DataFacts, Microbatch, Model, StepLoss, TableShape
from findrec.models.capabilities import UserItemVectors
from findrec.models.hdrm.config import ENCODER, HDRMConfig
from findrec.models.hdrm.denoiser import Denoiser
from findrec.models.hdrm.diffusion import Diffusion
from findrec.models.parts.artifacts import artifact_rows
from findrec.models.parts.hyperbolic_graph import (
    edge_points,
    fold_in,
    hinge,
    measures,
    propagate,
    ranked_points,
    score_signs,
)
from findrec.ops.lorentz import exp_origin
from findrec.tables.base import ITEMS, USERS
from findrec.tables.view import Tables

_SAMPLED_ROWS = 8192  # users diffused at a time


class HDRM(Model[Edges]):
    """Denoises the vectors of users, given the items of their history; the encoder is not changed."""

    Config = HDRMConfig

    score_signs: Tensor
    users_Ud: Tensor  # tangent vectors of the encoder
    items_Vd: Tensor
    folded_Ve: Tensor
    histories_Ud: Tensor  # sums of the tangent vectors of the items of each user
    scale_d: Tensor  # root mean square of the coordinates of users

    def __init__(self, config: HDRMConfig, facts: DataFacts) -> None:
        super().__init__()
        self.config = config
        self.graph = facts.interaction_graph()
        width = config.dim - 1
        known_U = self.graph.user_degree > 0
        prepared = self._encoded(facts, width)
        # Without a shift: the origin stays that of the tangent space, so signs and norms keep their meaning.
        scale_d = prepared["users_Ud"][known_U].square().mean(0).sqrt().clamp(min=1e-6)
        for name, values in (prepared | {"scale_d": scale_d, "score_signs": score_signs(config.dim)}).items():
            self.register_buffer(name, values, persistent=False)
        x_nd = self.users_Ud[known_U] / scale_d
        self.diffusion = Diffusion(config.diffusion, x_nd.mean(0), x_nd.std(0, correction=0))
        self.denoiser = Denoiser(width, config.diffusion.hidden, config.diffusion.steps)

    def _encoded(self, facts: DataFacts, width: int) -> dict[str, Tensor]:
        """The vectors of the first stage; zero if it is not trained yet and the model is only measured."""
        if facts.artifacts:
            rows = {name: artifact_rows(facts.artifacts[ENCODER], name) for name in (USERS, ITEMS)}
            self.graph.check_users(len(rows[USERS]), self.config.title)
        else:
            rows = {
                USERS: torch.zeros(facts.num_users + 1, width),
                ITEMS: torch.zeros(facts.num_items + 1, width),
            }
        layers = propagate(self.graph, rows[USERS], rows[ITEMS], self.config.encoder.layers)
        trained_V1 = (self.graph.item_degree > 0)[:, None]
        items_Vd = layers.item_tangents
        return {
            "users_Ud": layers.user_tangents,
            "items_Vd": items_Vd,
            "folded_Ve": torch.cat(
                [layers.folded_items(self.graph.item_degree), items_Vd * trained_V1], dim=1
            ),
            "histories_Ud": self.graph.sums_of_items(items_Vd),
        }

    @classmethod
    def examples(cls, config: RunConfig, folder: DataFolder) -> EdgeExamples:
        """See `Model`: the distinct user-item pairs of the training events."""
        assert isinstance(config.model, HDRMConfig)
        return EdgeExamples(config, folder, negatives=config.model.negatives)

    @classmethod
    def tables(cls, config: HDRMConfig, facts: DataFacts) -> dict[str, TableShape]:
        """See `Model`: none, as rows of users and items belong to the first stage."""
        return {}

    def describe(self, device: torch.device) -> str:
        """See `Model`."""
        return self.graph.describe()

    def loss(self, microbatch: Microbatch[Edges], tables: Tables) -> StepLoss:
        """See `Model`: reconstruction and ranking, both averaged over the edges."""
        config, edges = self.config, microbatch.examples
        v_nd = self.users_Ud[edges.user]
        x_nd = v_nd / self.scale_d
        step_n = torch.randint(1, config.diffusion.steps + 1, edges.user.shape, device=v_nd.device)
        noised_nd = self.diffusion.noised(x_nd, step_n, torch.randn_like(x_nd))
        # The history without the item of the edge, which would tell the answer.
        others_n = self.graph.user_degree[edges.user] - 1
        history_nd = self._history(self.histories_Ud[edges.user] - self.items_Vd[edges.item], others_n)
        kept_n = torch.rand_like(others_n) >= config.diffusion.drop_condition
        with torch.autocast(v_nd.device.type, torch.bfloat16, enabled=self.low_precision):
            estimate_nd = self.denoiser(noised_nd, step_n, history_nd, kept_n & (others_n > 0))
        estimate_nd = estimate_nd.float()
        error_n = self.diffusion.weight(step_n) * (estimate_nd - x_nd).square().mean(1)
        points = edge_points(self.items_Vd, edges.item, edges.negative)
        mixed_nd = self._mixed(v_nd, estimate_nd)
        hinge_nN = hinge(exp_origin(mixed_nd), *points, config.margin)
        part = config.reconstruction
        ranking, error = (
            hinge_nN.mean(1).sum() / microbatch.num_targets,
            error_n.sum() / microbatch.num_targets,
        )
        loss = (1 - part) * ranking + part * error
        aux = {"ranking": ranking.detach(), "reconstruction": error.detach()}
        measured = measures(hinge_nN, mixed_nd, self.items_Vd[edges.item])
        return StepLoss(loss, loss.detach(), aux, measured)

    def _history(self, sum_nd: Tensor, count_n: Tensor) -> Tensor:
        """The mean of the items of a history, in the coordinates of the diffusion: a guess of the user."""
        mean_nd: Tensor = sum_nd / count_n.clamp(min=1)[:, None] / self.scale_d
        return mean_nd

    def _mixed(self, v_nd: Tensor, x_nd: Tensor) -> Tensor:
        """Tangent vectors of users: those of the encoder with a share of the diffused ones."""
        mixed_nd: Tensor = (1 - self.config.mix) * v_nd + self.config.mix * self.scale_d * x_nd
        return mixed_nd

    def user_item_vectors(self, tables: Mapping[str, Tensor], features: ItemFeatures) -> UserItemVectors:
        """See `RanksUsers`: points of the hyperboloid.

        The noise of a user is drawn once from a fixed seed and belongs to the user's row; visitors have that
        of the padding row. So lists depend neither on other users nor on when they are computed.
        """
        normal_Ud = torch.randn(self.users_Ud.shape, generator=torch.Generator().manual_seed(0))
        normal_Ud = normal_Ud.to(self.users_Ud.device)
        split = self.items_Vd.shape[1]

        def visitors(total_Be: Tensor, count_B: Tensor) -> Tensor:
            rows_Be, items_Bd = total_Be[:, :-split], total_Be[:, -split:]
            v_Bd = fold_in(rows_Be, self.config.encoder.layers)
            return self._points(v_Bd, items_Bd, rows_Be[:, -1], normal_Ud[:1].expand_as(v_Bd))

        columns = (self.users_Ud, self.histories_Ud, self.graph.user_degree, normal_Ud)
        users = zip(*(torch.split(column, _SAMPLED_ROWS) for column in columns), strict=True)
        return UserItemVectors(
            users_Ud=torch.cat([self._points(*part) for part in users]),
            items_Vd=ranked_points(self.items_Vd, self.graph.item_degree),
            known_U=self.graph.user_degree > 0,
            folded_Ve=self.folded_Ve,
            fold_in=visitors,
        )

    def _points(self, v_Bd: Tensor, items_Bd: Tensor, count_B: Tensor, normal_Bd: Tensor) -> Tensor:
        """Points of users, from the encoder's vectors and the sums and numbers of the items of histories."""
        if self.config.mix == 0:
            return exp_origin(v_Bd)
        history_Bd = self._history(items_Bd, count_B)
        x_Bd = self.diffusion.sample(history_Bd, normal_Bd, self._guided(history_Bd, count_B > 0))
        return exp_origin(self._mixed(v_Bd, x_Bd))

    def _guided(self, history_Bd: Tensor, has_history_B: Tensor) -> _Guided:
        return _Guided(self.denoiser, history_Bd, has_history_B, self.config.diffusion.guidance)


class _Guided:
    """The denoiser for given histories, with classifier-free guidance (Ho & Salimans, arXiv 2207.12598)."""

    def __init__(
        self, denoiser: Denoiser, history_nd: Tensor, has_history_n: Tensor, strength: float
    ) -> None:
        self._denoiser, self._history_nd, self._has_history_n = denoiser, history_nd, has_history_n
        self._strength = strength

    def __call__(self, x_nd: Tensor, step_n: Tensor) -> Tensor:
        with_nd: Tensor = self._denoiser(x_nd, step_n, self._history_nd, self._has_history_n)
        if not self._strength:
            return with_nd
        none_n = torch.zeros_like(self._has_history_n)
        without_nd = self._denoiser(x_nd, step_n, self._history_nd, none_n)
        guided_nd: Tensor = with_nd + self._strength * (with_nd - without_nd)
        return guided_nd
