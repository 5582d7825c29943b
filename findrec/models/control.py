"""FindRec's control: causal attention between ID stream and modalities, experts chosen by each head, fusion.

Everything after the attention looks at one position alone, so a position can also be computed by itself from
the keys and values of those before it (`step`), which is how a stream of events is served.

Shape letters: B users, L steps, T asked-for positions, U distinct items, d width, M modalities, H heads,
h = d / H, E experts, t steps remembered.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from findrec.config import ModelConfig, RoutingConfig
from findrec.datasets.batch import Batch
from findrec.errors import FindRecError
from findrec.models.latents import Latents
from findrec.models.layers import Dropout, LayerScale, asked_rows
from findrec.ops.cross_modal_attention import cross_modal_attention
from findrec.ops.expert_routing import Routed, expert_routing


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
        normed_BLd, id_qkv = self._ask_id(id_BLd)
        # Latents know no time: normalise and project once per distinct item, then gather.
        modal_MUd, modal_MUX = self._ask_modal([latent.z_Ud for latent in latents])
        modal_qkv = torch.stack([F.embedding(batch.index, x_UX) for x_UX in modal_MUX])
        modal_qkv = modal_qkv.view(-1, *id_qkv.shape)
        reads_id, reads_modal = cross_modal_attention(id_qkv, modal_qkv, window=self.routing.window or None)
        item_T = batch.index.flatten().index_select(0, batch.position)
        return self._decide(
            id_Td,
            asked_rows(normed_BLd, batch),
            [F.embedding(item_T, modal_Ud) for modal_Ud in modal_MUd],
            [asked_rows(x, batch) for x in reads_id],
            [asked_rows(x, batch) for x in reads_modal],
        )

    def step(self, id_Bd: Tensor, z_MBd: Tensor, memory: Tensor) -> tuple[Tensor, Tensor]:
        """The correction `[B, d]` for one more event a user, and the memory with it.

        `z_MBd` are the latents of the event's item. `memory` `[1 + M, B, t, 2, H, h]` holds keys and values
        of the ID stream and of each modality at the events before; t is 0 at first, and no more than the
        window's.
        """
        normed_Bd, id_qkv = self._ask_id(id_Bd)
        normed_MBd, modal_MBX = self._ask_modal(list(z_MBd))
        modal_qkv = [x_BX.view(id_qkv.shape) for x_BX in modal_MBX]
        qkv = torch.stack([id_qkv, *modal_qkv])  # [1 + M, B, 3, H, h]
        memory = torch.cat([memory, qkv[:, :, None, 1:]], dim=2)
        if self.routing.window:
            memory = memory[:, :, -self.routing.window :]
        keys, values = memory.unbind(3)
        # Every modality asks the ID stream's memory; the ID stream asks each modality's.
        reads_id = _look_up(qkv[1:, :, 0], keys[:1], values[:1])
        reads_modal = _look_up(qkv[:1, :, 0], keys[1:], values[1:])
        correction_Bd, _ = self._decide(id_Bd, normed_Bd, normed_MBd, list(reads_id), list(reads_modal))
        return correction_Bd, memory

    def remember(self, id_BLd: Tensor, z_MBLd: list[Tensor]) -> Tensor:
        """The memory of `step` after whole rows of events, arguments as there; L may be 0."""
        lately = slice(-self.routing.window, None)  # all of them where the window is 0
        _, id_qkv = self._ask_id(id_BLd[:, lately])
        _, modal_MBLX = self._ask_modal([z_BLd[:, lately] for z_BLd in z_MBLd])
        return torch.stack([id_qkv, *(x.view(id_qkv.shape) for x in modal_MBLX)])[:, :, :, 1:]

    def _ask_id(self, id_d: Tensor) -> tuple[Tensor, Tensor]:
        """Normalised ID vectors `[..., d]`, and their queries, keys and values `[..., 3, H, h]`."""
        normed_d = self.norm_id(id_d)
        return normed_d, self.qkv_id(normed_d).unflatten(-1, (3, self.heads, -1))

    def _ask_modal(self, z_Mnd: list[Tensor]) -> tuple[list[Tensor], list[Tensor]]:
        """The same for latents `[n, d]` of each modality; queries, keys and values in one row `[n, 3 d]`."""
        normed = [norm(z_nd) for norm, z_nd in zip(self.norm_modal, z_Mnd, strict=True)]
        return normed, [project(x_nd) for project, x_nd in zip(self.qkv_modal, normed, strict=True)]

    def _decide(
        self,
        id_Td: Tensor,
        normed_Td: Tensor,
        modal_MTd: list[Tensor],
        reads_id: list[Tensor],
        reads_modal: list[Tensor],
    ) -> tuple[Tensor, Routed]:
        """Route and fuse; reads are `[T, H, h]` for each modality."""
        own_THh = normed_Td.view(len(id_Td), self.heads, -1)
        parts = []
        for modal_Td, to_modal, to_id in zip(modal_MTd, reads_id, reads_modal, strict=True):
            parts += [modal_Td.view(own_THh.shape) + to_modal, own_THh + to_id]
        routed: Routed = self.experts(torch.cat(parts, dim=-1))
        fused_Td = self.fuse(torch.cat([id_Td, routed.out_THo.flatten(1)], dim=1))
        return self.scale(self.dropout(fused_Td)), routed


def _look_up(query: Tensor, keys: Tensor, values: Tensor) -> Tensor:
    """Attention of one query a user and head `[*, B, H, h]` over `[*, B, t, H, h]`."""
    keys, values = (x.transpose(2, 3).expand(max(len(x), len(query)), -1, -1, -1, -1) for x in (keys, values))
    query = query.unsqueeze(3).expand(len(keys), -1, -1, -1, -1)
    return F.scaled_dot_product_attention(query, keys, values).squeeze(3)


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
