"""FindRec: multimodal sequential recommendation by information flow, control and output (arXiv 2507.04651).

Flow: latents of each item's content, and a memory of them in its table row, to which the row is aligned.
Control: gates decide by the agreement of the two whether the content is used or the memory. Output: a Mamba
stream over the item vectors; items are scored by the same vectors. README.md in this folder explains what is
the paper's, and why the rest differs.

Shape letters: B users, L steps, T target positions, U distinct items, d width.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from findrec.datasets.batches.batch import Batch
from findrec.datasets.batches.catalogue import ItemFeatures
from findrec.datasets.folder.features import ModalRows
from findrec.devices import is_cpu
from findrec.models.base import DataFacts, Out, SequenceModel, TableShape, Term
from findrec.models.capabilities import Explanation
from findrec.models.findrec.alignment import DIAGNOSTICS, alignment_terms, diagnose_alignment
from findrec.models.findrec.collapse import collapse_warnings
from findrec.models.findrec.config import FindRecConfig
from findrec.models.findrec.explain import explain
from findrec.models.findrec.items import ItemVectors, Rows, Weights, row_width
from findrec.models.findrec.views import Views, draw_views
from findrec.models.parts.layers import Inputs, WaitTimeModulation, gather_positions
from findrec.models.parts.repeat import RepeatHead
from findrec.models.parts.streaming import StreamingModel
from findrec.models.parts.streams import TransformerStream, build_stream
from findrec.ops.scan.selective_scan import scan_backend
from findrec.tables.base import ITEMS


class FindRec(SequenceModel):
    """The FindRec network. Without modalities it is the ID stream alone."""

    alignment_diagnostics = DIAGNOSTICS
    diagnosing = False  # whether training passes compute the diagnostics, which takes time

    Config = FindRecConfig

    def __init__(self, config: FindRecConfig, facts: DataFacts) -> None:
        """`facts.max_length` matters only for the Transformer stream, which has learned positions."""
        super().__init__()
        self.config: FindRecConfig = config
        dim = config.dim
        self.inputs = Inputs(dim, config.dropout, gaps=config.gaps, num_event_types=facts.num_event_types)
        self.stream = build_stream(dim, config.dropout, config.stream, facts.max_length)
        self.items = ItemVectors(facts.feature_dims, dim, config.control) if facts.feature_dims else None
        self.content_scores = self.items is not None
        self.moment = WaitTimeModulation(dim) if config.wait else None
        self.norm = nn.LayerNorm(dim)
        self.repeat_head = RepeatHead(dim) if config.repeat else None

    @classmethod
    def tables(cls, config: FindRecConfig, facts: DataFacts) -> dict[str, TableShape]:
        """See `Model`: a row holds the id's part and a memory for each modality."""
        return {ITEMS: TableShape(facts.num_items, row_width(config.dim, len(facts.feature_dims)))}

    def forward(self, batch: Batch, x_items: Tensor, features: Mapping[str, ModalRows]) -> Out:
        """See `SequenceModel`; auxiliary terms are `align_<modality>` and `gate_<modality>`."""
        vectors_Ud, aux, diagnostics = self._vectors(x_items, features)
        input_BLd = self.inputs.drop(self.inputs(batch, vectors_Ud))
        h_Td = self.finish(gather_positions(self.stream(input_BLd), batch), batch)
        return Out(h_Td, None if self.repeat_head is None else self.repeat_head(h_Td), aux, diagnostics)

    def finish(self, h_Td: Tensor, batch: Batch) -> Tensor:
        """User vectors from the outputs of the stream at the target positions."""
        if self.moment is not None:
            h_Td = self.moment(h_Td, batch)
        normed: Tensor = self.norm(h_Td)
        return normed

    def _vectors(
        self, x_items: Tensor, features: Mapping[str, ModalRows]
    ) -> tuple[Tensor, dict[str, Term], dict[str, float | Tensor]]:
        """Item vectors `[U, d]`, with the auxiliary terms and the diagnostics of a training pass."""
        if self.items is None:
            return x_items, {}, {}
        with torch.autocast(x_items.device.type, enabled=False):  # vectors are compared, and also scored
            rows = self.items.split(x_items)
            latents = self.items.encode(features)
            if not self.training:
                return self.items(rows, latents, features)[0], {}, {}
            views = draw_views(features, rows.known_n, self.config.control)
            vectors_Ud, weights = self.items(rows, latents, features, views)
            present_U = {name: features[name].present for name in latents}
            aux = alignment_terms(rows, latents, present_U, self.config.align)
            aux |= self._gate_terms(rows, weights, views)
            measured: dict[str, Tensor] = {}
            if self.diagnosing:
                measured |= _measure_gates(rows, weights, views)
                measured |= diagnose_alignment(rows, latents, present_U, self.config.align)
        return vectors_Ud, aux, {name: value.detach() for name, value in measured.items()}

    def _gate_terms(self, rows: Rows, weights: Weights, views: Views) -> dict[str, Term]:
        """Cross-entropy of the gates' knowledge of which content is wrong, over items with a memory."""
        names = list(weights.logit_n)
        if not names:
            return {}
        logits = list(weights.logit_n.values())
        judged_MU = torch.stack([weights.present_n[name] for name in names]) & rows.known_n
        judged_MU = judged_MU.to(logits[0].dtype)
        true_MU = torch.stack([views.true_U[name] for name in names]).to(judged_MU.dtype)
        if is_cpu(judged_MU.device):
            # One after the other: the last bits of a result depend on where in a tensor its values are.
            loss_M = torch.stack(
                [
                    F.binary_cross_entropy_with_logits(logit_U, true_U, reduction="none") @ judged_U.clone()
                    for logit_U, true_U, judged_U in zip(logits, true_MU, judged_MU, strict=True)
                ]
            )
        else:
            loss_MU = F.binary_cross_entropy_with_logits(torch.stack(logits), true_MU, reduction="none")
            loss_M = (loss_MU * judged_MU).sum(1)
        loss_M = loss_M / judged_MU.sum(1).clamp(min=1)
        weighted_M = self.config.control.weight * loss_M
        reported_M = loss_M.detach()
        return {f"gate_{name}": Term(weighted_M[m], reported_M[m]) for m, name in enumerate(names)}

    def item_transform(self, rows: Tensor, features: Mapping[str, ModalRows]) -> Tensor:
        """See `SequenceModel`; in training the content of the items is trusted (`ItemVectors.trusting`)."""
        if self.items is None:
            return rows
        split = self.items.split(rows)
        if self.training:
            return self.items.trusting(split, features)
        vectors: Tensor = self.items(split, self.items.encode(features), features)[0]
        return vectors

    def start_step(self, step: int) -> None:
        """See `Model`; enables diagnostics every `model.align.diagnose_every` steps."""
        every = self.config.align.diagnose_every
        self.diagnosing = every > 0 and step % every == 0

    def describe(self, device: torch.device) -> str:
        """See `Model`."""
        inputs = "ids only" if self.items is None else f"ids and {', '.join(self.items.names)}"
        return f"items by {inputs}, scan {scan_backend(device, self.config.stream.scan)}"

    def warnings(self, values: Mapping[str, float]) -> list[tuple[str, str]]:
        """See `Model`."""
        return collapse_warnings(values)

    def explain(self, batch: Batch, x_items: Tensor, features: Mapping[str, ModalRows]) -> Explanation:
        """See `findrec.models.capabilities.Explains`."""
        return explain(self, batch, x_items, features)

    @property
    def longest_history(self) -> int | None:
        """See `findrec.models.capabilities.LimitedHistory`: the Transformer stream has learned positions."""
        return self.stream.position.num_embeddings if isinstance(self.stream, TransformerStream) else None

    def stream_inputs(self, batch: Batch, rows: Tensor, features: Mapping[str, ModalRows]) -> Tensor:
        """See `findrec.models.parts.streaming.Streamable`."""
        embedded: Tensor = self.inputs(batch, self._vectors(rows, features)[0])
        return embedded

    def open_stream(self, rows_Vd: Tensor, catalogue: ItemFeatures) -> StreamingModel:
        """See `findrec.models.capabilities.Streams`."""
        return StreamingModel(self, rows_Vd, catalogue)


@torch.no_grad()
def _measure_gates(rows: Rows, weights: Weights, views: Views) -> dict[str, Tensor]:
    """The mean gate of true and of wrong content by modality, over items with a memory."""
    measured = {}
    for name, gate_U in weights.gate_n.items():
        judged_U = weights.present_n[name] & rows.known_n & views.row_U
        for kind, of_kind_U in (("true", views.true_U[name]), ("wrong", ~views.true_U[name])):
            use_U = judged_U & of_kind_U
            # Without such items the expected value: a mean over microbatches should not depend on them.
            fallback = 1.0 if kind == "true" else 0.0
            mean = (gate_U * use_U).sum() / use_U.sum().clamp(min=1)
            measured[f"gate_{kind}_{name}"] = torch.where(use_U.any(), mean, fallback)
    return measured
