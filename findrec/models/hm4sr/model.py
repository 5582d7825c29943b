"""HM4SR: a hierarchical time-aware mixture of experts over id and content (Zhang et al., arXiv 2501.14269).

Each event has a stream for its id and one for each modality. Interactive experts filter them by each other,
temporal experts by the time of the event; then a causal Transformer reads each stream, and the score of an
item is the sum of the inner products of the streams. README.md in this folder has the equations and what
differs from the public code.

Shape letters: B users, L steps, T target positions, U distinct items, S streams, d width of a stream.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from findrec.datasets.batches.batch import Batch
from findrec.datasets.folder.features import ModalRows
from findrec.errors import FindRecError
from findrec.models.base import DataFacts, Out, SequenceModel, Term
from findrec.models.hm4sr.config import HM4SRConfig
from findrec.models.hm4sr.experts import InteractiveExperts, TemporalExperts
from findrec.models.hm4sr.tasks import CategoryPrediction, TimePlaceholders
from findrec.models.hm4sr.times import TimeEmbedding
from findrec.models.parts.activation_checkpointing import CheckpointedModule
from findrec.models.parts.content import ContentProjections
from findrec.models.parts.contrast import info_nce, sample_rows
from findrec.models.parts.layers import Inputs, WaitTimeModulation, gather_positions
from findrec.models.parts.repeat import RepeatHead
from findrec.models.parts.transformer import Block, LearnedPositions, initialise


class Encoder(CheckpointedModule):
    """The sequence layers of one stream."""

    def __init__(self, config: HM4SRConfig) -> None:
        super().__init__()
        self.norm_in, self.norm_out = nn.LayerNorm(config.dim), nn.LayerNorm(config.dim)
        self.blocks = nn.ModuleList(
            [Block(config.dim, config.heads, config.dropout) for _ in range(config.layers)]
        )

    def forward(self, x_BLd: Tensor, inputs: Inputs, batch: Batch) -> Tensor:
        """User vectors `[T, d]` at the target positions; `inputs` has the dropout of inputs."""
        x_BLd = inputs.drop(self.norm_in(x_BLd))
        for block in self.blocks:
            x_BLd = self.run_layer(block, x_BLd)
        normed_Td: Tensor = self.norm_out(gather_positions(x_BLd, batch))
        return normed_Td


class HM4SR(SequenceModel):
    """The HM4SR network. Without modalities the id is its only stream."""

    Config = HM4SRConfig

    def __init__(self, config: HM4SRConfig, facts: DataFacts) -> None:
        """Raises `FindRecError` if the data lacks the modality of the categories."""
        super().__init__()
        self.config = config
        dim, tasks = config.dim, config.tasks
        self.names = config.inputs(facts.feature_dims)
        streams = 1 + len(self.names)
        self.inputs = Inputs(dim, config.dropout, gaps=config.gaps, num_event_types=facts.num_event_types)
        self.position = LearnedPositions(facts.max_length, dim)
        self.encoders = nn.ModuleList([Encoder(config) for _ in range(streams)])
        self.interactive = self.temporal = self.time = None
        if config.interactive.experts:
            self.interactive = InteractiveExperts(dim, streams, config.interactive.experts)
        if config.temporal.experts:
            self.time = TimeEmbedding(dim, config.temporal)
            self.temporal = TemporalExperts(dim, streams, config.temporal.experts, self.time.width)
        self.placeholders = None
        if self.time is not None and self.names and tasks.placeholder_contrast:
            self.placeholders = TimePlaceholders(dim, len(self.names), self.time.width, tasks.placeholders)
        self.category = None
        if config.categories is not None and tasks.category:
            self.category = CategoryPrediction(streams * dim, _num_categories(config, facts))
        self.apply(initialise)
        # After `apply`: these have initialisations of their own.
        self.content = ContentProjections({name: facts.feature_dims[name] for name in self.names}, dim)
        self.content_scores = bool(self.names)
        self.reads_targets = tasks.id_contrast > 0
        self.moment = WaitTimeModulation(streams * dim) if config.wait else None
        self.repeat_head = RepeatHead(streams * dim) if config.repeat else None

    @property
    def longest_history(self) -> int:
        """See `findrec.models.capabilities.LimitedHistory`: the number of learned positions."""
        return self.position.num_embeddings

    def forward(self, batch: Batch, x_items: Tensor, features: Mapping[str, ModalRows]) -> Out:
        """See `SequenceModel`; raises `FindRecError` for a history longer than `max_length`.

        Auxiliary terms are `id_contrast`, `placeholder_<modality>` and `category`.
        """
        content = self.content.encode(features)
        x_BLSd = self._streams(batch, x_items, content)
        time_BLt = None if self.time is None else self.time(batch)
        if self.interactive is not None:
            x_BLSd = self.run_layer(self.interactive, x_BLSd)
        if self.temporal is not None:
            x_BLSd = self.temporal(x_BLSd, time_BLt)
        vectors = self._encode(x_BLSd, batch)
        aux: dict[str, Term] = {}
        if self.training:
            aux = self._contrasts(batch, x_items, vectors, x_BLSd, time_BLt)
            if self.category is not None:
                assert self.config.categories is not None
                x_USd = torch.stack([x_items, *content.values()], dim=1) * self.inputs.scale
                value = self.category(x_USd, features[self.config.categories], batch)
                aux["category"] = Term(self.config.tasks.category * value, value.detach())
        h_Tv = torch.cat(vectors, dim=1)
        if self.moment is not None:
            h_Tv = self.moment(h_Tv, batch)
        return Out(h_Tv, None if self.repeat_head is None else self.repeat_head(h_Tv), aux)

    def _streams(self, batch: Batch, x_items: Tensor, content: Mapping[str, Tensor]) -> Tensor:
        """The inputs `[B, L, S, d]`: id and content of each event, with its position added to each."""
        streams = [self.inputs(batch, x_items)]
        streams += [latent_Ud[batch.index] * self.inputs.scale for latent_Ud in content.values()]
        position_Ld = self.position(batch.item.shape[1])
        x_BLSd: Tensor = torch.stack(streams, dim=2) + position_Ld[:, None]
        return x_BLSd

    def _encode(self, x_BLSd: Tensor, batch: Batch, first: int = 0) -> list[Tensor]:
        """User vectors `[T, d]` of the streams from number `first` on, which are those of `x_BLSd`."""
        return [
            encoder(x_BLSd[:, :, s], self.inputs, batch)
            for s, encoder in enumerate(list(self.encoders)[first:])
        ]

    def _contrasts(
        self,
        batch: Batch,
        x_items: Tensor,
        vectors: list[Tensor],
        x_BLSd: Tensor,
        time_BLt: Tensor | None,
    ) -> dict[str, Term]:
        """The contrast of ids with targets, and of content with itself where times replace some of it."""
        tasks, terms = self.config.tasks, {}
        chosen_n = sample_rows(len(batch.target), tasks.rows, x_items.device)

        def term(
            name: str, one_Td: Tensor, two_Td: Tensor, group_T: Tensor, weight: float, temperature: float
        ) -> None:
            triple = (x if chosen_n is None else x[chosen_n] for x in (one_Td, two_Td, group_T))
            value = self.run_layer(info_nce, *triple, temperature)
            terms[name] = Term(weight * value, value.detach())

        if tasks.id_contrast:
            assert batch.target_index is not None, "`reads_targets` is set"
            wanted_Td = x_items[batch.target_index]
            term("id_contrast", vectors[0], wanted_Td, batch.target, tasks.id_contrast, tasks.id_temperature)
        if self.placeholders is not None:
            altered_BLSd = self.placeholders(x_BLSd[:, :, 1:], time_BLt)
            altered = self._encode(altered_BLSd, batch, first=1)
            # Positions of one user are alike anyway, and no negatives of each other.
            user_T = batch.user[batch.position // batch.item.shape[1]]
            for name, whole_Td, altered_Td in zip(self.names, vectors[1:], altered, strict=True):
                weight = tasks.placeholder_contrast / len(self.names)
                temperature = tasks.placeholder_temperature
                term(f"placeholder_{name}", whole_Td, altered_Td, user_T, weight, temperature)
        return terms

    def item_transform(self, rows: Tensor, features: Mapping[str, ModalRows]) -> Tensor:
        """See `SequenceModel`: the row and the latents of the item, `[n, S * d]`, without experts."""
        return torch.cat([rows, *self.content.encode(features).values()], dim=1)


def _num_categories(config: HM4SRConfig, facts: DataFacts) -> int:
    """The number of categories, the width of their modality."""
    assert config.categories is not None
    if config.categories not in facts.feature_dims:
        have = ", ".join(facts.feature_dims) or "none"
        raise FindRecError(
            f"model.categories={config.categories!r} names no modality of the data, which has {have}: add it "
            "as ready features with one column for each category (datasets/README.md), or leave it out"
        )
    return facts.feature_dims[config.categories]
