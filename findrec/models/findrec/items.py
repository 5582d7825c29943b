"""Item vectors of FindRec: ids, content, and the gates that decide how far content is trusted.

The row of an item has a part for its id and one for each modality, its memory: what the item's content was
when its events were seen. The vector of an item, which enters the sequence and is what it is scored by, is

    v = id + sum over modalities of  g * latent + (1 - g) * memory

with the latent of the content given. Where content is missing, g = 0 and the memory takes its place; for an
item without events, which has no memory, g = 1. Otherwise g is the probability that the content belongs to
the item, from the agreement of latent and memory (`Gate`).

Gates and memories are trained by their own losses only: if the ranking loss reached them, it would prefer
memories, which fit the training items best, to content, which generalises.

Shape letters: n items, w width of a table row, d width of item vectors, M modalities.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from findrec.datasets.folder.features import ModalRows
from findrec.models.findrec.config import ControlConfig
from findrec.models.findrec.views import Views
from findrec.models.parts.content import ContentProjections
from findrec.tables.initial_rows import TABLE_STD

GATE_HIDDEN = 16
COSINE_SCALE = 8.0
# Logits are small numbers times this, so that a gate becomes sharp within the few thousand steps of a short
# training, at the learning rate of the other weights.
LOGIT_SCALE = 4.0


def row_width(dim: int, num_modalities: int) -> int:
    """The width of a table row: the id part and the memories."""
    return dim * (1 + num_modalities)


@dataclass(frozen=True)
class Rows:
    """The parts of table rows."""

    id_nd: Tensor
    memory_nd: Mapping[str, Tensor]  # by modality

    @cached_property
    def known_n(self) -> Tensor:
        """Bool, whether the item has training events: the rows of others are zero."""
        return self.id_nd.detach().bool().any(1)


@dataclass(frozen=True)
class Weights:
    """How the vectors of items were composed."""

    logit_n: Mapping[str, Tensor]  # by modality: log-odds that content belongs to its item
    gate_n: Mapping[str, Tensor]  # by modality: g
    present_n: Mapping[str, Tensor]  # by modality: bool


class Gate(nn.Module):
    """The probability that content belongs to its item, from the agreement of its latent with the memory.

    The evidence, their cosine and distance (`evidence`), is detached: a gate describes the vectors, and must
    not change them.
    """

    def __init__(self) -> None:
        super().__init__()
        self.hidden = nn.Linear(2, GATE_HIDDEN)
        self.out = nn.Linear(GATE_HIDDEN, 1)
        # Content is trusted at first: all gates start at sigmoid(2), whatever the evidence.
        nn.init.zeros_(self.out.weight)
        nn.init.constant_(self.out.bias, 2.0 / LOGIT_SCALE)

    def forward(self, evidence_n2: Tensor) -> Tensor:
        """Log-odds `[n]`, from `evidence`."""
        logit_n: Tensor = LOGIT_SCALE * self.out(F.gelu(self.hidden(evidence_n2))).squeeze(1)
        return logit_n


def evidence(latent_Mnd: Tensor, memory_Mnd: Tensor) -> list[Tensor]:
    """`[n, 2]` for each modality: the cosine and the distance of latents and memories, scaled."""
    latent_Mnd, memory_Mnd = latent_Mnd.detach(), memory_Mnd.detach()
    cosine_Mn = F.cosine_similarity(latent_Mnd, memory_Mnd, dim=2, eps=1e-6)
    distance_Mn = torch.linalg.vector_norm(latent_Mnd - memory_Mnd, dim=2) / TABLE_STD
    parts = zip(COSINE_SCALE * cosine_Mn, distance_Mn, strict=True)
    # Not as one tensor: on a CPU the last bits of products depend on where in memory a matrix begins.
    return [torch.stack(part, dim=1) for part in parts]


class ItemVectors(ContentProjections):
    """Composes item vectors from table rows and features."""

    def __init__(self, feature_dims: Mapping[str, int], dim: int, control: ControlConfig) -> None:
        super().__init__(feature_dims, dim)
        self.dim, self.names = dim, list(feature_dims)
        # Rows are initialised, and updated, at the scale of item vectors. A memory has to follow latents that
        # grow to a multiple of it, from the few updates that a rare item gets.
        self.memory_scale = 0.5 * dim**0.5
        self.gates = None
        if control.gates == "learned":
            self.gates = nn.ModuleDict({name: Gate() for name in feature_dims})

    def split(self, rows_nw: Tensor) -> Rows:
        """The parts of table rows `[n, (1 + M) d]`."""
        id_nd = rows_nw[:, : self.dim]
        memories = torch.split(rows_nw[:, self.dim :] * self.memory_scale, self.dim, dim=1)
        return Rows(id_nd, dict(zip(self.names, memories, strict=True)))

    def forward(
        self,
        rows: Rows,
        latents: Mapping[str, Tensor],
        features: Mapping[str, ModalRows],
        views: Views | None = None,
        order_n: Tensor | None = None,
    ) -> tuple[Tensor, Weights]:
        """Item vectors `[n, d]` and how they were composed.

        With `views`, of what these show. `order_n`, a permutation of the items, exchanges their gates: a test
        of whether these carry information.
        """
        known_n = rows.known_n if views is None else views.row_U
        vector_nd = rows.id_nd * known_n[:, None]
        presents: Mapping[str, Tensor] = {name: features[name].present for name in latents}
        if views is not None:
            presents = views.present_U
            latents = {name: latent_nd[views.source_U[name]] for name, latent_nd in latents.items()}
        # Modalities together: each kernel of a GPU takes as long for one as for all of them.
        gate_Mn = torch.stack([presents[name] for name in latents]).to(vector_nd.dtype)
        logits: dict[str, Tensor] = {}
        if self.gates is not None:
            memory_Mnd = torch.stack([rows.memory_nd[name] for name in latents])
            shown = evidence(torch.stack(list(latents.values())), memory_Mnd)
            logits = {name: self.gates[name](shown_n2) for name, shown_n2 in zip(latents, shown, strict=True)}
            chance_Mn = torch.stack([torch.sigmoid(logit_n.detach()) for logit_n in logits.values()])
            gate_Mn = gate_Mn * torch.where(known_n, chance_Mn, 1.0)
        if order_n is not None:
            gate_Mn = gate_Mn[:, order_n] * torch.stack([presents[name] for name in latents])
        gates = dict(zip(latents, gate_Mn.unbind(), strict=True))
        kept_Mn = (1 - gate_Mn) * known_n
        for (name, latent_nd), kept_n in zip(latents.items(), kept_Mn.unbind(), strict=True):
            memory_nd = rows.memory_nd[name].detach()
            vector_nd = vector_nd + gates[name][:, None] * latent_nd + kept_n[:, None] * memory_nd
        return vector_nd, Weights(logits, gates, presents)

    def trusting(self, rows: Rows, features: Mapping[str, ModalRows]) -> Tensor:
        """Item vectors `[n, d]` with content trusted wherever there is some.

        What items are scored by in training, where the content of the catalogue is the true one: without
        gates this takes a fraction of the time.
        """
        vector_nd = rows.id_nd
        for name, latent_nd in self.encode(features).items():
            # Memories of items without events are zero, as their rows are.
            memory_nd = rows.memory_nd[name].detach()
            vector_nd = vector_nd + torch.where(features[name].present[:, None], latent_nd, memory_nd)
        return vector_nd
