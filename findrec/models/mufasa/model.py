"""MUFASA: multimodal fusion and sparse-attention-guided alignment for long sequences (arXiv 2508.09664).

The last stage: a sequence model over fused item vectors, which an earlier stage has learned, and table rows.
README.md in this folder says what is the paper's and what is a reconstruction.

Shape letters: B users, L padded length, T target positions, U distinct items, d width.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from findrec.datasets.batches.batch import Batch
from findrec.datasets.folder.features import ModalRows
from findrec.models.base import DataFacts, Out, SequenceModel, Term
from findrec.models.mufasa.attention import SparseLayer
from findrec.models.mufasa.config import FUSION, MufasaConfig, SizesConfig
from findrec.models.mufasa.fusion import FusionLayer
from findrec.models.mufasa.items import ItemVectors
from findrec.models.mufasa.preference import consistency_loss, preference_loss
from findrec.models.parts.artifacts import artifact_weights
from findrec.models.parts.frozen import freeze
from findrec.models.parts.layers import Inputs, WaitTimeModulation, gather_positions
from findrec.models.parts.repeat import RepeatHead
from findrec.ops.sparse_attention.sizes import SparseSizes, sizes_for

# Multiplies the learned logarithm of the length of user vectors, which scores need to become sharp within a
# short training at the learning rate of the other weights.
SCALE_RATE = 4.0


class Mufasa(SequenceModel):
    """The sequence model. Its checkpoint has the weights of the fusion layer too."""

    content_scores = True

    Config = MufasaConfig

    def __init__(self, config: MufasaConfig, facts: DataFacts) -> None:
        """Raises `FindRecError` if the data lacks the anchor."""
        super().__init__()
        self.config: MufasaConfig = config
        dim = config.dim
        self.sizes = sizes = sizes_for(facts.max_length)
        if isinstance(config.sizes, SizesConfig):
            self.sizes = sizes = SparseSizes(**config.sizes.model_dump())
        self.fusion = FusionLayer(facts.feature_dims, config.anchor, config.fusion)
        if FUSION in facts.artifacts:
            self.fusion.load_state_dict(artifact_weights(facts.artifacts[FUSION], "fusion."))
        if config.tuning == "frozen":
            freeze(self.fusion)
        self.items = ItemVectors(config.fusion.dim, dim)
        self.inputs = Inputs(dim, config.dropout, gaps=config.gaps, num_event_types=facts.num_event_types)
        self.layers = nn.ModuleList(
            [
                SparseLayer(dim, config.heads, config.groups, sizes, config.branches, config.dropout)
                for _ in range(config.layers)
            ]
        )
        self.norm = nn.LayerNorm(dim)
        self.log_scale = nn.Parameter(torch.zeros(1))
        self.moment = WaitTimeModulation(dim) if config.wait else None
        self.repeat_head = RepeatHead(dim) if config.repeat else None

    def forward(self, batch: Batch, x_items: Tensor, features: Mapping[str, ModalRows]) -> Out:
        """See `SequenceModel`; auxiliary terms are `preference` and `consistency`."""
        with torch.autocast(x_items.device.type, enabled=False):  # vectors are compared, and also scored
            fused = self.fusion(features)
            content_Ud, token_Ud = self.items(x_items, fused.fused_nf)
        x_BLd = self.inputs.drop(self.inputs(batch, token_Ud))
        h_Td = self._run_layers(x_BLd, batch)
        if self.moment is not None:
            h_Td = self.moment(h_Td, batch)
        h_Td = self.norm(h_Td) * torch.exp(SCALE_RATE * self.log_scale)
        repeat = None if self.repeat_head is None else self.repeat_head(h_Td)
        if not self.training:
            return Out(h_Td, repeat)
        with torch.autocast(x_items.device.type, enabled=False):
            aux = self._terms(h_Td.float(), batch, x_items, content_Ud, fused.present_n)
        return Out(h_Td, repeat, aux)

    def _run_layers(self, x_BLd: Tensor, batch: Batch) -> Tensor:
        """The outputs of the layers at the target positions `[T, d]`."""
        *first, last = self.layers
        for layer in first:
            x_BLd = self.run_layer(layer, x_BLd)
        rows, length = batch.item.shape
        if not self.training and len(batch.position) == rows:
            row_T = torch.div(batch.position, length, rounding_mode="floor")
            if bool((row_T == torch.arange(rows, device=row_T.device)).all()):
                # One position for each user: the last layer is computed for this one only.
                last_Bd: Tensor = last(x_BLd, (batch.position - row_T * length)[:, None])[:, 0]
                return last_Bd
        return gather_positions(self.run_layer(last, x_BLd), batch)

    def _terms(
        self, h_Td: Tensor, batch: Batch, rows_Ud: Tensor, content_Ud: Tensor, present_U: Tensor
    ) -> dict[str, Term]:
        alignment = self.config.alignment
        vectors_Ud = self.items.score(rows_Ud, content_Ud)
        preference = preference_loss(h_Td, vectors_Ud, batch, alignment.temperature)
        consistency = consistency_loss(content_Ud, rows_Ud, present_U)
        return {
            "preference": Term(alignment.preference * preference, preference.detach()),
            "consistency": Term(alignment.consistency * consistency, consistency.detach()),
        }

    def item_transform(self, rows: Tensor, features: Mapping[str, ModalRows]) -> Tensor:
        """See `SequenceModel`: v of each item."""
        content_nd, _ = self.items(rows, self.fusion(features).fused_nf)
        return self.items.score(rows, content_nd)

    def describe(self, device: torch.device) -> str:
        """See `Model`."""
        return f"anchor {self.config.anchor}, fusion {self.config.tuning}, attention {self.sizes}"
