"""The second stage: trains the fusion layer on items, by four losses.

    L = w_1 anchor + w_2 collaborative + w_3 structure + w_4 distribution

1. anchor: the fused vector, and each modality, finds the title of its item among those of other items.
2. collaborative: the fused vector finds the item's vector of the first stage, and the fused vector of an item
   that was consumed close to it.
3. structure: similarities of fused vectors follow those of titles; no stream collapses.
4. distribution: fused vectors are distributed like a standard normal.

Each loss is logged without its weight.

Shape letters: n items, f width of fused vectors, d width of rows of the first stage.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from findrec.config import RunConfig
from findrec.datasets.batches.catalogue import ItemFeatures
from findrec.datasets.folder.data_folder import DataFolder
from findrec.models.base import DataFacts, Microbatch, Model, StepLoss, TableShape
from findrec.models.mufasa.config import COLLABORATIVE, FusionStageConfig
from findrec.models.mufasa.fusion import Fused, FusionLayer, anchor_features, anchor_width
from findrec.models.mufasa.item_pairs import ItemPairExamples, ItemPairs
from findrec.models.mufasa.losses import (
    anti_collapse,
    contrast,
    distribution,
    negative_bias,
    pair_bias,
    structure,
)
from findrec.models.parts.artifacts import artifact_rows
from findrec.models.parts.spread import spread
from findrec.tables.view import Tables

FUSED = "fused"  # name of the stream of fused vectors in diagnostics
MIN_STD = 0.1  # of a stream; layer normalisation starts near 1
MIN_RANK = 1.5


class FusionStage(Model[ItemPairs]):
    """Trains `fusion`, whose weights the sequence model reads; the projections of titles serve the losses."""

    Config = FusionStageConfig

    collaborative_Vd: Tensor

    def __init__(self, config: FusionStageConfig, facts: DataFacts) -> None:
        """Raises `FindRecError` if the data lacks the anchor."""
        super().__init__()
        self.config = config
        dim = config.fusion.dim
        self.fusion = FusionLayer(facts.feature_dims, config.anchor, config.fusion)
        self.title = nn.Linear(anchor_width(facts.feature_dims, config.anchor), dim)
        self.consumed = None
        if config.fusion.losses.collaborative > 0:
            self.consumed = nn.Linear(dim, config.dim)
            rows = torch.zeros(facts.num_items + 1, config.dim)
            if COLLABORATIVE in facts.artifacts:
                rows = artifact_rows(facts.artifacts[COLLABORATIVE])
            self.register_buffer("collaborative_Vd", rows, persistent=False)

    @classmethod
    def examples(cls, config: RunConfig, folder: DataFolder) -> ItemPairExamples:
        """See `Model`: all items, with partners."""
        assert isinstance(config.model, FusionStageConfig)
        return ItemPairExamples(config, folder, reach=config.model.fusion.reach)

    @classmethod
    def tables(cls, config: Any, facts: DataFacts) -> dict[str, TableShape]:
        """See `Model`: none, as fused vectors are functions of content."""
        return {}

    def loss(self, microbatch: Microbatch[ItemPairs], tables: Tables) -> StepLoss:
        """See `Model`."""
        with torch.autocast(microbatch.examples.item.device.type, enabled=False):
            terms, fused = self._terms(microbatch.examples, microbatch.features)
        weights = self.config.fusion.losses
        total = torch.stack([getattr(weights, name) * value for name, value in terms.items()]).sum()
        total = total / microbatch.num_microbatches
        aux = {name: value.detach() / microbatch.num_microbatches for name, value in terms.items()}
        return StepLoss(total, total.detach(), aux, _diagnose(fused))

    def _terms(self, items: ItemPairs, source: ItemFeatures) -> tuple[dict[str, Tensor], Fused]:
        """The losses whose weights are not 0."""
        weights = self.config.fusion.losses
        features = source.features(items.item)
        fused = self.fusion(features, hide=True)
        unit_nM, has_n = anchor_features(features, self.config.anchor)
        use_n = has_n & fused.present_n
        terms = {}
        if weights.anchor > 0:
            terms["anchor"] = self._anchor(fused, unit_nM, has_n, items.genre)
        if weights.collaborative > 0:
            terms["collaborative"] = self._collaborative(fused, items, source)
        if weights.structure > 0:
            similar = structure(unit_nM[use_n], fused.fused_nf[use_n], weights.structure_temperature)
            spreads = [anti_collapse(z_nf, weights.covariance) for z_nf in _present(fused).values()]
            terms["structure"] = similar + torch.stack(spreads).mean()
        if weights.distribution > 0:
            terms["distribution"] = distribution(fused.fused_nf[fused.present_n], weights.distance)
        return terms, fused

    def _anchor(self, fused: Fused, unit_nM: Tensor, has_n: Tensor, genre_n: Tensor) -> Tensor:
        """Fused vectors against titles, plus the mean of the same for each modality."""
        losses = self.config.fusion.losses
        bias_nn = negative_bias(unit_nM, genre_n, losses.same_genre)
        title_nf = self.title(unit_nM)

        def against_titles(z_nf: Tensor, present_n: Tensor) -> Tensor:
            use_n = (has_n & present_n).nonzero().squeeze(1)
            return contrast(z_nf[use_n], title_nf[use_n], losses.temperature, bias_nn[use_n][:, use_n])

        each = [against_titles(a_nf, a_nf.detach().bool().any(1)) for a_nf in fused.streams.values()]
        return against_titles(fused.fused_nf, fused.present_n) + torch.stack(each).mean()

    def _collaborative(self, fused: Fused, items: ItemPairs, source: ItemFeatures) -> Tensor:
        """The mean of the contrasts with vectors of the first stage and with partners."""
        assert self.consumed is not None
        temperature = self.config.fusion.losses.temperature
        known_n = (fused.present_n & (items.count > 0)).nonzero().squeeze(1)
        vector_nd = self.collaborative_Vd[items.item[known_n]]
        none_nn = vector_nd.new_zeros(len(known_n), len(known_n))
        same = contrast(self.consumed(fused.fused_nf[known_n]), vector_nd, temperature, none_nn)
        partner = self.fusion(source.features(items.partner), hide=True)
        use_n = (fused.present_n & partner.present_n & (items.partner > 0)).nonzero().squeeze(1)
        bias_nn = pair_bias(items.item[use_n], items.partner[use_n], items.partner_count[use_n])
        near = contrast(fused.fused_nf[use_n], partner.fused_nf[use_n], temperature, bias_nn, symmetric=False)
        return (same + near) / 2

    def warnings(self, values: Mapping[str, float]) -> list[tuple[str, str]]:
        """See `Model`: streams that have collapsed."""
        return collapse_warnings(values)


def _present(fused: Fused) -> dict[str, Tensor]:
    """The vectors of each stream that belong to items with that modality, and of the fused vectors."""
    streams = {name: a_nf[a_nf.detach().bool().any(1)] for name, a_nf in fused.streams.items()}
    return streams | {FUSED: fused.fused_nf[fused.present_n]}


@torch.no_grad()
def _diagnose(fused: Fused) -> dict[str, float | Tensor]:
    """`std_<stream>` and `rank_<stream>` of the vectors of each stream."""
    diagnostics: dict[str, float | Tensor] = {}
    for name, z_nf in _present(fused).items():
        # Expected values where there are too few vectors to measure.
        std, rank = z_nf.new_ones(()), z_nf.new_full((), float(z_nf.shape[1]))
        if len(z_nf) > 1:
            std, rank = spread(z_nf.float() - z_nf.float().mean(0))
        diagnostics |= {f"std_{name}": std, f"rank_{name}": rank}
    return diagnostics


def collapse_warnings(values: Mapping[str, float]) -> list[tuple[str, str]]:
    """`(key, message)` for each stream whose diagnostics in the logged `values` show a collapse."""
    warnings = []
    for key, value in values.items():
        kind, _, stream = key.removeprefix("diagnostics/").partition("_")
        problem = None
        if kind == "std" and value < MIN_STD:
            problem = f"vectors of the stream {stream!r} have collapsed to a point (std {value:.2g})"
        elif kind == "rank" and value < MIN_RANK:
            problem = f"vectors of the stream {stream!r} have collapsed to a line (rank {value:.2f})"
        if problem is not None:
            warnings.append((key, f"{problem}; raise model.fusion.losses.structure, or lower the others"))
    return warnings
