"""FindRec as its paper and public code describe it (arXiv 2507.04651), for comparison with `findrec`.

Flow: a Mamba stream over item ids, and Gaussian latents of every modality, aligned to the ID vectors by a
Stein discrepancy. Control: causal attention between the two, then expert routing per head. Output: the routed
vector corrects that of the ID stream. Everything is causal, so all positions are trained at once.

Where the paper and its public code disagree, this implementation follows the paper: modalities are aligned to
the ID stream (not to each other), latents are not normalised, attention is over time (not over users), the
balance term spreads the load, and evaluation draws no noise.

Shape letters: B users, L steps, T target positions, U distinct items, d width, M modalities, H heads,
h = d / H, E experts.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from findrec.datasets.batches.batch import Batch
from findrec.datasets.batches.catalogue import ItemFeatures
from findrec.datasets.folder.features import ModalRows
from findrec.models.base import DataFacts, Out, SequenceModel, Term
from findrec.models.capabilities import Explanation
from findrec.models.findrec_2025.alignment import DIAGNOSTICS, Alignment, diagnose_alignment
from findrec.models.findrec_2025.collapse import collapse_warnings
from findrec.models.findrec_2025.config import FindRec2025Config, RoutingConfig
from findrec.models.findrec_2025.control import Control
from findrec.models.findrec_2025.explain import explain
from findrec.models.findrec_2025.item_side import ItemSide
from findrec.models.findrec_2025.latents import Latents, ModalEncoder
from findrec.models.findrec_2025.streaming import StreamingFindRec2025
from findrec.models.parts.layers import Inputs, WaitTimeModulation, gather_positions
from findrec.models.parts.repeat import RepeatHead
from findrec.models.parts.streams import TransformerStream, build_stream
from findrec.ops.expert_routing import Routed
from findrec.ops.scan.selective_scan import scan_backend


class FindRec2025(SequenceModel):
    """The FindRec network. Without modalities it is the ID stream alone."""

    alignment_diagnostics = DIAGNOSTICS
    diagnosing = False  # whether training passes compute the alignment diagnostics, which takes time

    Config = FindRec2025Config

    def __init__(self, config: FindRec2025Config, facts: DataFacts) -> None:
        """Raises `FindRecError` if the heads do not divide the width.

        `facts.max_length` matters only for the Transformer stream, which has learned positions.
        """
        super().__init__()
        self.config: FindRec2025Config = config
        dim, feature_dims = config.dim, facts.feature_dims
        self.inputs = Inputs(dim, config.dropout, gaps=config.gaps, num_event_types=facts.num_event_types)
        self.stream = build_stream(dim, config.dropout, config.stream, facts.max_length)
        self.encoders = nn.ModuleDict(
            {name: ModalEncoder(width, dim, config.dropout) for name, width in feature_dims.items()}
        )
        self.alignment = Alignment(config.align, list(feature_dims), dim)
        self.control = Control(config, len(feature_dims)) if feature_dims else None
        where = config.items.features if feature_dims else "none"
        self.item_side = None if where == "none" else ItemSide(feature_dims, dim, config.items.id_dropout)
        self.content_inputs = where in ("input", "both")
        self.content_scores = where in ("score", "both")
        # The name `moment` is part of the checkpoint format.
        self.moment = WaitTimeModulation(dim) if config.wait else None
        self.norm = nn.LayerNorm(dim)
        self.repeat_head = RepeatHead(dim) if config.repeat else None

    def forward(self, batch: Batch, x_items: Tensor, features: Mapping[str, ModalRows]) -> Out:
        """See `SequenceModel`; auxiliary terms are those of `Alignment`, and `balance` and `z` of routing."""
        id_BLd = self.stream(self.inputs.drop(self.embed(batch, x_items, features)))
        h_Td = gather_positions(id_BLd, batch)
        aux: dict[str, Term] = {}
        diagnostics: dict[str, float | Tensor] = {}
        if self.control is not None:
            latents = {name: encoder(features[name]) for name, encoder in self.encoders.items()}
            correction_Td, routed = self.run_layer(self.control, batch, id_BLd, h_Td, list(latents.values()))
            h_Td = h_Td + correction_Td
            if self.training:
                aux, diagnostics = self._auxiliary(latents, x_items, routed)
        if self.moment is not None:
            h_Td = self.moment(h_Td, batch)
        h_Td = self.norm(h_Td)
        return Out(h_Td, None if self.repeat_head is None else self.repeat_head(h_Td), aux, diagnostics)

    def start_step(self, step: int) -> None:
        """See `Model`; enables diagnostics every `model.align.diagnose_every` steps."""
        every = self.config.align.diagnose_every
        self.diagnosing = every > 0 and step % every == 0

    def describe(self, device: torch.device) -> str:
        """See `Model`."""
        return f"scan {scan_backend(device, self.config.stream.scan)}"

    def warnings(self, values: Mapping[str, float]) -> list[tuple[str, str]]:
        """See `Model`."""
        return collapse_warnings(values)

    def _auxiliary(
        self, latents: Mapping[str, Latents], x_items: Tensor, routed: Routed
    ) -> tuple[dict[str, Term], dict[str, float | Tensor]]:
        """The auxiliary terms and the diagnostics of a training pass."""
        with torch.autocast(x_items.device.type, enabled=False):
            latents = {name: latent.float() for name, latent in latents.items()}
            aux = self.alignment(latents, x_items) | _routing_terms(routed, self.config.routing)
            measured = _measure_routing(routed)
            if self.diagnosing:
                measured |= diagnose_alignment(latents, x_items, self.config.align.rows)
            return aux, {name: value.detach() for name, value in measured.items()}

    def stream_inputs(self, batch: Batch, rows: Tensor, features: Mapping[str, ModalRows]) -> Tensor:
        """See `findrec.models.parts.streaming.Streamable`."""
        return self.embed(batch, rows, features)

    def embed(self, batch: Batch, x_items: Tensor, features: Mapping[str, ModalRows]) -> Tensor:
        """The inputs of the stream `[B, L, d]`, without dropout; arguments as in `forward`."""
        if self.item_side is not None and self.content_inputs:
            x_items = self.item_side(x_items, features)
        embedded: Tensor = self.inputs(batch, x_items)
        return embedded

    def item_transform(self, rows: Tensor, features: Mapping[str, ModalRows]) -> Tensor:
        """See `SequenceModel`: adds content if `model.items.features` is `score` or `both`."""
        if self.item_side is None or not self.content_scores:
            return rows
        vectors: Tensor = self.item_side(rows, features)
        return vectors

    def explain(self, batch: Batch, x_items: Tensor, features: Mapping[str, ModalRows]) -> Explanation:
        """See `findrec.models.capabilities.Explains`."""
        return explain(self, batch, x_items, features)

    @property
    def longest_history(self) -> int | None:
        """See `findrec.models.capabilities.LimitedHistory`: the Transformer stream has learned positions."""
        return self.stream.position.num_embeddings if isinstance(self.stream, TransformerStream) else None

    def open_stream(self, rows_Vd: Tensor, catalogue: ItemFeatures) -> StreamingFindRec2025:
        """See `findrec.models.capabilities.Streams`."""
        return StreamingFindRec2025(self, rows_Vd, catalogue)


def _routing_terms(routed: Routed, config: RoutingConfig) -> dict[str, Term]:
    if config.kind == "mean":
        return {}
    return {
        "balance": Term(config.balance_weight * routed.balance, routed.balance.detach()),
        "z": Term(config.z_weight * routed.z, routed.z.detach()),
    }


@torch.no_grad()
def _measure_routing(routed: Routed) -> dict[str, Tensor]:
    """The mean gate entropy (ln E if gates are equal) and the largest mean gate of an expert."""
    gates_THE = routed.gates_THE
    count = max(1, gates_THE.shape[0] * gates_THE.shape[1])
    measured = {"gate_entropy": -(gates_THE * gates_THE.clamp(min=1e-9).log()).sum() / count}
    if gates_THE.shape[2] > 1:
        measured["expert_load_max"] = (gates_THE.sum((0, 1)) / count).max()
    return measured
