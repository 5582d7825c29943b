"""FindRec: multimodal sequential recommendation by information flow, control and output (arXiv 2507.04651).

Flow: a Mamba stream over item ids, and Gaussian latents of every modality, pulled towards the ID vectors by a
Stein discrepancy. Control: causal attention between the two, then experts that each head chooses for itself.
Output: the routed vector corrects the ID stream's. All positions are trained at once: everything is causal.

Where the published structure and its public code disagree, or the code is in error, this follows the claims:
modalities are aligned to the ID stream (not to each other), latents are not normalised, attention runs over
time (not over users), the balance term spreads the load, and evaluation draws no noise.

Shape letters: B users, L steps, T asked-for positions, U distinct items, d width, M modalities, H heads,
h = d / H, E experts.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from findrec.config import ModelConfig, RoutingConfig
from findrec.datasets.batch import Batch, ModalRows
from findrec.models.alignment import Alignment, diagnose_alignment
from findrec.models.base import Out, SequenceModel, Term
from findrec.models.control import Control
from findrec.models.item_side import ItemSide
from findrec.models.latents import Latents, ModalEncoder
from findrec.models.layers import Inputs, Moment, asked_rows
from findrec.models.precision import full_products
from findrec.models.repeat import RepeatHead
from findrec.models.streams import build_stream
from findrec.ops.expert_routing import Routed


class FindRec(SequenceModel):
    """The whole network. Without any modality it is the ID stream alone."""

    def __init__(
        self,
        config: ModelConfig,
        *,
        feature_dims: Mapping[str, int],
        repeat: bool,
        max_length: int,
        num_event_types: int = 0,
    ) -> None:
        """`max_length` limits the Transformer stream alone, which learns positions. Raises `FindRecError`
        when heads do not divide the width.
        """
        super().__init__()
        self.config = config
        dim = config.dim
        self.inputs = Inputs(dim, config.dropout, gaps=config.gaps, num_event_types=num_event_types)
        self.stream = build_stream(dim, config.dropout, config.stream, max_length)
        self.encoders = nn.ModuleDict(
            {name: ModalEncoder(width, dim, config.dropout) for name, width in feature_dims.items()}
        )
        self.alignment = Alignment(config.align, list(feature_dims), dim)
        self.control = Control(config, len(feature_dims)) if feature_dims else None
        where = config.items.features if feature_dims else "none"
        self.item_side = None if where == "none" else ItemSide(feature_dims, dim, config.items.id_dropout)
        self.content_inputs = where in ("input", "both")
        self.content_scores = where in ("score", "both")
        self.moment = Moment(dim) if config.wait else None
        self.norm = nn.LayerNorm(dim)
        self.repeat_head = RepeatHead(dim) if repeat else None

    def forward(self, batch: Batch, x_items: Tensor, features: Mapping[str, ModalRows]) -> Out:
        """See `SequenceModel`. Auxiliary terms: those of `Alignment`, and `balance` and `z` of the router."""
        id_BLd = self.stream(self.inputs.drop(self.embed(batch, x_items, features)))
        h_Td = asked_rows(id_BLd, batch)
        aux: dict[str, Term] = {}
        diagnostics: dict[str, float] = {}
        if self.control is not None:
            latents = {name: encoder(features[name]) for name, encoder in self.encoders.items()}
            correction_Td, routed = self.run_layer(self.control, batch, id_BLd, h_Td, list(latents.values()))
            h_Td = h_Td + correction_Td
            if self.training:
                aux, diagnostics = self._watch(latents, x_items, routed)
        if self.moment is not None:
            h_Td = self.moment(h_Td, batch)
        h_Td = self.norm(h_Td)
        return Out(h_Td, None if self.repeat_head is None else self.repeat_head(h_Td), aux, diagnostics)

    def _watch(
        self, latents: Mapping[str, Latents], x_items: Tensor, routed: Routed
    ) -> tuple[dict[str, Term], dict[str, float]]:
        """Auxiliary terms and diagnostics of a training pass."""
        with full_products(x_items.device):
            latents = {name: latent.float() for name, latent in latents.items()}
            aux = self.alignment(latents, x_items) | _routing_terms(routed, self.config.routing)
            measured = _measure_routing(routed)
            if self.diagnosing:
                measured |= diagnose_alignment(latents, x_items, self.config.align.rows)
            return aux, _numbers(measured)

    def embed(self, batch: Batch, x_items: Tensor, features: Mapping[str, ModalRows]) -> Tensor:
        """What enters the stream, `[B, L, d]`, without dropout; arguments as in `forward`."""
        if self.item_side is not None and self.content_inputs:
            x_items = self.item_side(x_items, features)
        embedded: Tensor = self.inputs(batch, x_items)
        return embedded

    def item_transform(self, rows: Tensor, features: Mapping[str, ModalRows]) -> Tensor:
        """See `SequenceModel`: content is added where `model.items.features` says `score` or `both`."""
        if self.item_side is None or not self.content_scores:
            return rows
        whole: Tensor = self.item_side(rows, features)
        return whole


def _routing_terms(routed: Routed, config: RoutingConfig) -> dict[str, Term]:
    if config.kind == "mean":
        return {}
    return {
        "balance": Term(config.balance_weight * routed.balance, routed.balance.detach()),
        "z": Term(config.z_weight * routed.z, routed.z.detach()),
    }


@torch.no_grad()
def _measure_routing(routed: Routed) -> dict[str, Tensor]:
    """Mean gate entropy (ln E when even), the largest mean gate of an expert."""
    gates_THE = routed.gates_THE
    count = max(1, gates_THE.shape[0] * gates_THE.shape[1])
    measured = {"gate_entropy": -(gates_THE * gates_THE.clamp(min=1e-9).log()).sum() / count}
    if gates_THE.shape[2] > 1:
        measured["expert_load_max"] = (gates_THE.sum((0, 1)) / count).max()
    return measured


def _numbers(values: Mapping[str, Tensor]) -> dict[str, float]:
    numbers = torch.stack([value.float() for value in values.values()]).tolist()  # one transfer for all
    return dict(zip(values, numbers, strict=True))
