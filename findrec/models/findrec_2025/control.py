"""The control stage of FindRec: cross-modal causal attention, expert routing per head, and fusion.

Everything after the attention is computed position by position. So a single position can be computed from the
cached keys and values of the earlier ones (`step`), which is used to serve streams of events.

Shape letters: B users, L steps, T target positions, U distinct items, d width, M modalities, H heads,
h = d / H, E experts, t cached steps.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from findrec.datasets.batches.batch import Batch
from findrec.errors import FindRecError
from findrec.models.findrec_2025.config import FindRec2025Config, RoutingConfig
from findrec.models.findrec_2025.latents import Latents
from findrec.models.parts.layers import Dropout, LayerScale, gather_positions
from findrec.ops.cross_modal_attention import cross_modal_attention
from findrec.ops.expert_routing import Routed, expert_routing


class Control(nn.Module):
    """Cross-modal attention, routing per head, and fusion to a correction of the ID stream's vector."""

    def __init__(self, config: FindRec2025Config, num_modal: int) -> None:
        super().__init__()
        dim, self.routing = config.dim, config.routing
        self.heads = self.routing.heads
        if dim % self.heads:
            raise FindRecError(
                f"model.dim={dim} is not a multiple of model.routing.heads={self.heads}: each head takes an "
                "equal part of the width; change one of them"
            )
        width = dim // self.heads
        self.norm_id = nn.LayerNorm(dim)
        self.norm_modal = nn.ModuleList([nn.LayerNorm(dim) for _ in range(num_modal)])
        self.qkv_id = nn.Linear(dim, 3 * dim)
        self.qkv_modal = nn.ModuleList([nn.Linear(dim, 3 * dim) for _ in range(num_modal)])
        self.experts = HeadExperts(2 * num_modal * width, 2 * width, self.routing, config.dropout)
        self.fuse = nn.Linear(3 * dim, dim)
        self.scale = LayerScale(dim)  # initially small: the output starts near the ID stream
        self.dropout = Dropout(config.dropout)

    def forward(
        self, batch: Batch, id_BLd: Tensor, id_Td: Tensor, latents: list[Latents]
    ) -> tuple[Tensor, Routed]:
        """The correction `[T, d]` of the ID stream's vectors, and the output of the router."""
        normed_BLd, id_qkv = self._project_id(id_BLd)
        # Latents do not depend on time: normalise and project once per distinct item, then gather.
        modal_MUd, modal_MUX = self._project_modal([latent.z_Ud for latent in latents])
        modal_qkv = torch.stack([F.embedding(batch.index, x_UX) for x_UX in modal_MUX])
        modal_qkv = modal_qkv.view(-1, *id_qkv.shape)
        attended_id, attended_modal = cross_modal_attention(
            id_qkv, modal_qkv, window=self.routing.window or None
        )
        item_T = batch.index.flatten().index_select(0, batch.position)
        return self._route_and_fuse(
            id_Td,
            gather_positions(normed_BLd, batch),
            [F.embedding(item_T, modal_Ud) for modal_Ud in modal_MUd],
            [gather_positions(x, batch) for x in attended_id],
            [gather_positions(x, batch) for x in attended_modal],
        )

    def step(self, id_Bd: Tensor, z_MBd: Tensor, cache: Tensor) -> tuple[Tensor, Tensor]:
        """The correction `[B, d]` for one more event per user, and the cache with this event appended.

        Args:
            id_Bd: output of the ID stream for the event.
            z_MBd: latents of the event's item.
            cache: `[1 + M, B, t, 2, H, h]`, keys and values of the ID stream and of each modality at the
                earlier events of the window.
        """
        normed_Bd, id_qkv = self._project_id(id_Bd)
        normed_MBd, modal_MBX = self._project_modal(list(z_MBd))
        modal_qkv = [x_BX.view(id_qkv.shape) for x_BX in modal_MBX]
        qkv = torch.stack([id_qkv, *modal_qkv])  # [1 + M, B, 3, H, h]
        cache = torch.cat([cache, qkv[:, :, None, 1:]], dim=2)
        if self.routing.window:
            cache = cache[:, :, -self.routing.window :]
        keys, values = cache.unbind(3)
        # Every modality attends to the ID stream, and the ID stream to each modality.
        attended_id = _attend(qkv[1:, :, 0], keys[:1], values[:1])
        attended_modal = _attend(qkv[:1, :, 0], keys[1:], values[1:])
        correction_Bd, _ = self._route_and_fuse(
            id_Bd, normed_Bd, normed_MBd, list(attended_id), list(attended_modal)
        )
        return correction_Bd, cache

    def prefill(self, id_BLd: Tensor, z_MBLd: list[Tensor]) -> Tensor:
        """The cache of `step` after whole rows of events; L may be 0."""
        window = slice(-self.routing.window, None)  # window 0: all events
        _, id_qkv = self._project_id(id_BLd[:, window])
        _, modal_MBLX = self._project_modal([z_BLd[:, window] for z_BLd in z_MBLd])
        return torch.stack([id_qkv, *(x.view(id_qkv.shape) for x in modal_MBLX)])[:, :, :, 1:]

    def _project_id(self, id_d: Tensor) -> tuple[Tensor, Tensor]:
        """Normalised ID vectors `[..., d]`, and their queries, keys and values `[..., 3, H, h]`."""
        normed_d = self.norm_id(id_d)
        return normed_d, self.qkv_id(normed_d).unflatten(-1, (3, self.heads, -1))

    def _project_modal(self, z_Mnd: list[Tensor]) -> tuple[list[Tensor], list[Tensor]]:
        """The same for latents `[n, d]` of each modality, with queries, keys and values as `[n, 3 d]`."""
        normed = [norm(z_nd) for norm, z_nd in zip(self.norm_modal, z_Mnd, strict=True)]
        return normed, [project(x_nd) for project, x_nd in zip(self.qkv_modal, normed, strict=True)]

    def _route_and_fuse(
        self,
        id_Td: Tensor,
        normed_Td: Tensor,
        modal_MTd: list[Tensor],
        attended_id: list[Tensor],
        attended_modal: list[Tensor],
    ) -> tuple[Tensor, Routed]:
        """Route and fuse; the attention outputs are `[T, H, h]` for each modality."""
        id_THh = normed_Td.view(len(id_Td), self.heads, -1)
        parts = []
        for modal_Td, to_modal, to_id in zip(modal_MTd, attended_id, attended_modal, strict=True):
            parts += [modal_Td.view(id_THh.shape) + to_modal, id_THh + to_id]
        routed: Routed = self.experts(torch.cat(parts, dim=-1))
        fused_Td = self.fuse(torch.cat([id_Td, routed.out_THo.flatten(1)], dim=1))
        return self.scale(self.dropout(fused_Td)), routed


def _attend(query: Tensor, keys: Tensor, values: Tensor) -> Tensor:
    """Attention of one query per user and head `[*, B, H, h]` over `[*, B, t, H, h]`."""
    keys, values = (x.transpose(2, 3).expand(max(len(x), len(query)), -1, -1, -1, -1) for x in (keys, values))
    query = query.unsqueeze(3).expand(len(keys), -1, -1, -1, -1)
    return F.scaled_dot_product_attention(query, keys, values).squeeze(3)


class HeadExperts(nn.Module):
    """Router and experts of all heads; the router is shared, the experts are not."""

    def __init__(self, width: int, out_width: int, config: RoutingConfig, dropout: float) -> None:
        super().__init__()
        self.config = config
        self.norm = nn.LayerNorm(width)
        self.router = None
        if config.kind == "learned":
            last = nn.Linear(2 * width, config.experts)
            nn.init.xavier_uniform_(last.weight, gain=0.1)  # gates start nearly equal
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
