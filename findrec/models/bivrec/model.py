"""BiVRec: interests of a user in two views, of ids and of content (Hu et al. 2024, arXiv 2402.17334).

Each view decomposes the history into K interests; an item is scored by the largest of the K sums of the
inner products in both views. README.md in this folder has the equations, and what is a reconstruction.

Shape letters: B users, L steps, T target positions, U distinct items, K interests, d width of a view.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from findrec.datasets.batches.batch import Batch
from findrec.datasets.folder.features import ModalRows
from findrec.models.base import DataFacts, Out, SequenceModel, Term
from findrec.models.bivrec.config import BiVRecConfig
from findrec.models.bivrec.interests import View
from findrec.models.bivrec.losses import allocation_divergence, maximum_loss, read_out
from findrec.models.parts.content import ContentProjections
from findrec.models.parts.contrast import info_nce, sample_rows
from findrec.models.parts.layers import Inputs, WaitTimeModulation, gather_positions
from findrec.models.parts.repeat import RepeatHead

VIEWS = ("id", "content")


class BiVRec(SequenceModel):
    """The BiVRec network. Without modalities it has the view of ids only."""

    Config = BiVRecConfig
    reads_targets = True  # which interest a target is of

    def __init__(self, config: BiVRecConfig, facts: DataFacts) -> None:
        super().__init__()
        self.config = config
        self.max_length = facts.max_length
        self.inputs = Inputs(config.dim, 0.0, gaps=config.gaps, num_event_types=facts.num_event_types)
        self.names = VIEWS if facts.feature_dims else VIEWS[:1]
        self.views = nn.ModuleList([View(config, facts.max_length) for _ in self.names])
        self.content = ContentProjections(facts.feature_dims, config.dim)
        self.content_scores = bool(facts.feature_dims)
        width = config.dim * len(self.names)
        self.moment = WaitTimeModulation(width) if config.wait else None
        self.repeat_head = RepeatHead(width) if config.repeat else None

    @property
    def longest_history(self) -> int:
        """See `findrec.models.capabilities.LimitedHistory`: the number of learned positions."""
        return self.max_length

    def forward(self, batch: Batch, x_items: Tensor, features: Mapping[str, ModalRows]) -> Out:
        """See `SequenceModel`: `[T, K, S d]`, or in training `[T, S d]`, what is read out for the target.

        Raises `FindRecError` for a history longer than `max_length`. Auxiliary terms are `maximum`,
        `view_id`, `view_content`, `overall` and `allocation`.
        """
        items = [x_items, *self._content_vectors(features)]
        inputs = [self.inputs(batch, x_items)]
        inputs += [vector_Ud[batch.index] * self.inputs.scale for vector_Ud in items[1:]]
        interests, logits = [], []
        for view, x_BLd in zip(self.views, inputs, strict=True):
            interest_BLKd, logit_BLK = view(x_BLd)
            interests.append(gather_positions(interest_BLKd, batch))
            logits.append(logit_BLK)
        h_TKv = torch.cat(interests, dim=2)
        if self.moment is not None:
            h_TKv = self.moment(h_TKv.transpose(0, 1), batch).transpose(0, 1)
        repeat = None if self.repeat_head is None else self.repeat_head(h_TKv.mean(1))
        if not self.training:
            return Out(h_TKv, repeat)
        assert batch.target_index is not None, "`reads_targets` is set"
        wanted = [vector_Ud[batch.target_index] for vector_Ud in items]
        h_Tv = read_out(h_TKv, torch.cat(wanted, dim=1))
        aux = self._view_terms(h_TKv, h_Tv, wanted, batch)
        aux |= self._cross_terms(interests, logits, batch, features)
        return Out(h_Tv, repeat, aux)

    def _content_vectors(self, features: Mapping[str, ModalRows]) -> list[Tensor]:
        """The content vectors `[n, d]` of items, in a list that is empty without modalities."""
        latents = list(self.content.encode(features).values())
        return [torch.stack(latents).sum(0)] if latents else []

    def _view_terms(self, h_TKv: Tensor, h_Tv: Tensor, wanted: list[Tensor], batch: Batch) -> dict[str, Term]:
        """The target among those of the microbatch: by the maximum, and in each view by itself."""
        losses, terms = self.config.losses, {}
        chosen = sample_rows(len(batch.target), losses.rows, h_Tv.device)

        def some(x_Td: Tensor) -> Tensor:
            return x_Td if chosen is None else x_Td[chosen]

        target_n = some(batch.target)
        if losses.maximum:
            value = self.run_layer(maximum_loss, some(h_TKv), some(torch.cat(wanted, dim=1)), target_n)
            terms["maximum"] = Term(losses.maximum * value, value.detach())
        if losses.views:
            parts = torch.split(h_Tv, self.config.dim, dim=1)
            for name, one_Td, two_Td in zip(self.names, parts, wanted, strict=True):
                value = self.run_layer(info_nce, some(one_Td), some(two_Td), target_n, losses.temperature)
                terms[f"view_{name}"] = Term(losses.views * value, value.detach())
        return terms

    def _cross_terms(
        self, interests: list[Tensor], logits: list[Tensor], batch: Batch, features: Mapping[str, ModalRows]
    ) -> dict[str, Term]:
        """The views of one user are alike as a whole, and in which events belong together."""
        losses, terms = self.config.losses, {}
        if len(self.names) < 2:
            return {}
        if losses.overall:
            # Positions of one user are alike anyway, and no negatives of each other.
            user_T = batch.user[batch.position // batch.item.shape[1]]
            triple = [*(x_TKd.mean(1) for x_TKd in interests), user_T]
            chosen = sample_rows(len(batch.position), losses.rows, batch.position.device)
            if chosen is not None:
                triple = [x[chosen] for x in triple]
            value = self.run_layer(info_nce, *triple, losses.temperature)
            terms["overall"] = Term(losses.overall * value, value.detach())
        if losses.allocation and self.config.interests.number > 1:
            present_U = torch.stack([rows.present for rows in features.values()]).any(0)
            value = allocation_divergence(logits[0], logits[1], present_U[batch.index])
            terms["allocation"] = Term(losses.allocation * value, value.detach())
        return terms

    def item_transform(self, rows: Tensor, features: Mapping[str, ModalRows]) -> Tensor:
        """See `SequenceModel`: row and content vector, `[n, S d]`."""
        return torch.cat([rows, *self._content_vectors(features)], dim=1)
