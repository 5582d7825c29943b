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
from torch.nn import functional as F

from findrec.config import ModelConfig, RoutingConfig
from findrec.datasets.batch import Batch, ModalRows
from findrec.errors import FindRecError
from findrec.models.alignment import Alignment, diagnose_alignment
from findrec.models.base import Out, SequenceModel, Term
from findrec.models.item_side import ItemSide
from findrec.models.latents import Latents, ModalEncoder
from findrec.models.layers import Dropout, Inputs, LayerScale, Moment, asked_rows
from findrec.models.repeat import RepeatHead
from findrec.models.streams import build_stream
from findrec.ops.cross_modal_attention import cross_modal_attention
from findrec.ops.expert_routing import Routed, expert_routing


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
        rows_Ud = x_items
        if self.item_side is not None and self.content_inputs:
            rows_Ud = self.item_side(rows_Ud, features)
        id_BLd = self.stream(self.inputs.drop(self.inputs(batch, rows_Ud)))
        h_Td = asked_rows(id_BLd, batch)
        aux: dict[str, Term] = {}
        diagnostics: dict[str, float] = {}
        if self.control is not None:
            latents = {name: encoder(features[name]) for name, encoder in self.encoders.items()}
            correction_Td, routed = self.control(batch, id_BLd, h_Td, list(latents.values()))
            h_Td = h_Td + correction_Td
            if self.training:
                aux = self.alignment(latents, x_items) | _routing_terms(routed, self.config.routing)
                measured = _measure_routing(routed)
                if self.diagnosing:
                    measured |= diagnose_alignment(latents, x_items, self.config.align.rows)
                diagnostics = _numbers(measured)
        if self.moment is not None:
            h_Td = self.moment(h_Td, batch)
        h_Td = self.norm(h_Td)
        return Out(h_Td, None if self.repeat_head is None else self.repeat_head(h_Td), aux, diagnostics)

    def item_transform(self, rows: Tensor, features: Mapping[str, ModalRows]) -> Tensor:
        """See `SequenceModel`: content is added where `model.items.features` says `score` or `both`."""
        if self.item_side is None or not self.content_scores:
            return rows
        whole: Tensor = self.item_side(rows, features)
        return whole


class Control(nn.Module):
    """Cross-modal attention, per-head routing, and fusion to a correction of the ID stream's vector."""

    def __init__(self, config: ModelConfig, num_modal: int) -> None:
        super().__init__()
        dim, self.routing = config.dim, config.routing
        self.heads = self.routing.heads
        if dim % self.heads:
            raise FindRecError(
                f"model.dim={dim} is no multiple of model.routing.heads={self.heads}: each head takes an "
                "equal part of the width; change one of them"
            )
        width = dim // self.heads
        self.norm_id = nn.LayerNorm(dim)
        self.norm_modal = nn.ModuleList([nn.LayerNorm(dim) for _ in range(num_modal)])
        self.qkv_id = nn.Linear(dim, 3 * dim)
        self.qkv_modal = nn.ModuleList([nn.Linear(dim, 3 * dim) for _ in range(num_modal)])
        self.experts = HeadExperts(2 * num_modal * width, 2 * width, self.routing, config.dropout)
        self.fuse = nn.Linear(3 * dim, dim)
        self.scale = LayerScale(dim)  # small: training starts near the ID stream alone
        self.dropout = Dropout(config.dropout)

    def forward(
        self, batch: Batch, id_BLd: Tensor, id_Td: Tensor, latents: list[Latents]
    ) -> tuple[Tensor, Routed]:
        """The correction `[T, d]` and what the router did."""
        b, length, dim = id_BLd.shape
        split = (self.heads, dim // self.heads)
        id_BLd = self.norm_id(id_BLd)
        id_qkv = self.qkv_id(id_BLd).view(b, length, 3, *split)
        # Latents know no time: normalise and project once per distinct item, then gather.
        modal_Ud = [norm(latent.z_Ud) for norm, latent in zip(self.norm_modal, latents, strict=True)]
        modal_UX = [project(modal) for project, modal in zip(self.qkv_modal, modal_Ud, strict=True)]
        modal_qkv = torch.stack([F.embedding(batch.index, x) for x in modal_UX])
        reads_id, reads_modal = cross_modal_attention(
            id_qkv, modal_qkv.view(-1, b, length, 3, *split), window=self.routing.window or None
        )

        item_T = batch.index.flatten().index_select(0, batch.position)
        parts = []
        own_THh = asked_rows(id_BLd, batch).view(-1, *split)
        for modal, to_modal, to_id in zip(modal_Ud, reads_id, reads_modal, strict=True):
            parts.append(F.embedding(item_T, modal).view(-1, *split) + asked_rows(to_modal, batch))
            parts.append(own_THh + asked_rows(to_id, batch))
        routed: Routed = self.experts(torch.cat(parts, dim=-1))
        fused_Td = self.fuse(torch.cat([id_Td, routed.out_THo.flatten(1)], dim=1))
        return self.scale(self.dropout(fused_Td)), routed


class HeadExperts(nn.Module):
    """Router and experts of all heads; the router is shared, each head has experts of its own."""

    def __init__(self, width: int, out_width: int, config: RoutingConfig, dropout: float) -> None:
        super().__init__()
        self.config = config
        self.norm = nn.LayerNorm(width)
        self.router = None
        if config.kind == "learned":
            last = nn.Linear(2 * width, config.experts)
            nn.init.xavier_uniform_(last.weight, gain=0.1)  # gates start near even
            nn.init.zeros_(last.bias)
            self.router = nn.Sequential(nn.Linear(width, 2 * width), nn.GELU(), Dropout(dropout), last)
        bound = width**-0.5
        self.weight = nn.Parameter(
            torch.empty(config.heads, config.experts, width, out_width).uniform_(-bound, bound)
        )
        self.bias = nn.Parameter(torch.zeros(config.heads, config.experts, out_width))

    def forward(self, x_THi: Tensor) -> Routed:
        """See `expert_routing`."""
        x_THi = self.norm(x_THi)
        if self.router is None:
            logits_THE = x_THi.new_zeros(*x_THi.shape[:2], self.config.experts)
        else:
            logits_THE = self.router(x_THi)
        return expert_routing(
            x_THi,
            logits_THE,
            self.weight,
            self.bias,
            temperature=self.config.temperature,
            top_k=self.config.top_k,
        )


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
