"""The published FindRec model (arXiv 2507.04651) as a benchmark baseline.

Written from a description of the published RecBole model, with its sizes: one target per sample (prefix
augmentation), features projected and encoded at every position of every sample, Python loops over attention
heads and over experts, a Stein term with `[B, B, D]` differences, and a loss at the last position only.

It deviates where the published code does not run or would make the comparison unfair:

* the scan is mambapy's parallel one, or (`scan="ours"`) this project's; the rest of a Mamba block is ours;
* attention is over time. The published code attends over the users of a batch, which costs B / L times as
  much and, because of transposed masks, fails unless B == L;
* features come from a table on the device, not through a Python loop over positions;
* modules that are never called are left out.

The signs of the published Stein term are kept: they do not affect the cost.

Shape letters: B samples, L steps, d ID width, D modal width, H heads, h = D / H, E experts, V items.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Literal

import torch
from bench.scan import mambapy_scan, unbind_scan
from torch import Tensor, nn
from torch.nn import functional as F

from findrec.models.parts.mamba import Mamba, MambaStream, causal_conv
from findrec.models.parts.stream_config import StreamConfig
from findrec.progress import say


@dataclass(frozen=True)
class PublishedConfig:
    """Sizes of the published configuration."""

    dim: int = 128
    modal_dim: int = 256
    heads: int = 8
    experts: int = 4
    dropout: float = 0.2
    modal_dropout: float = 0.1
    align_weight: float = 0.1
    temperature: float = 0.1
    scan: Literal["parallel", "ours"] = "parallel"  # mambapy's, or this project's
    stream: StreamConfig = field(default_factory=StreamConfig)


class Published(nn.Module):
    """The network with frozen tables `[V + 1, M]` of two modalities (row 0 is padding), and its loss."""

    def __init__(self, num_items: int, features: Mapping[str, Tensor], config: PublishedConfig) -> None:
        super().__init__()
        if len(features) != 2:
            raise ValueError(f"the published model needs two modalities, not {len(features)}")
        self.config = config
        self.items = nn.Embedding(num_items + 1, config.dim, padding_idx=0)
        self.stream = MambaStream(config.dim, config.dropout, config.stream)
        if config.scan == "parallel":
            self.stream.blocks = nn.ModuleList(
                [GenericMamba(config.dim, config.stream) for _ in range(config.stream.layers)]
            )
        self.names = list(features)
        for name, table in features.items():
            self.register_buffer(f"features_{name}", table, persistent=False)
        width, rate = config.modal_dim, config.modal_dropout
        self.project = nn.ModuleList([nn.Linear(table.shape[1], width) for table in features.values()])
        self.encode = nn.ModuleList([_encoder(width, rate) for _ in features])
        self.score = nn.ModuleList([_score_net(width, rate) for _ in features])
        self.attention = HeadLoop(width, config.heads, rate)
        self.experts = ExpertLoop(config)
        self.fuse = nn.Sequential(
            nn.Linear(config.heads * config.dim, config.dim),
            nn.ReLU(),
            nn.LayerNorm(config.dim),
            nn.Dropout(rate),
        )
        self.final = nn.Sequential(
            nn.Linear(2 * config.dim, config.dim),
            nn.LayerNorm(config.dim),
            nn.ReLU(),
            nn.Dropout(config.dropout),
            nn.LayerNorm(config.dim),
        )

    def forward(self, item_BL: Tensor, length_B: Tensor) -> tuple[Tensor, Tensor]:
        """User vectors `[B, d]` at the last valid position, and the weighted auxiliary loss.

        `item_BL` is right-padded with 0, `length_B` counts valid positions (at least 1).
        """
        id_BLd = self.stream(self.items(item_BL))
        row_B, last_B = torch.arange(len(item_BL)), length_B - 1
        latents, scores, divergence = [], [], id_BLd.new_zeros(())
        for name, project, encode, score in zip(
            self.names, self.project, self.encode, self.score, strict=True
        ):
            table: Tensor = getattr(self, f"features_{name}")
            modal_BLD = F.normalize(project(table[item_BL]), dim=-1)
            mean_BLD, logvar_BLD = encode(modal_BLD).chunk(2, dim=-1)
            noise_BLD = torch.randn_like(mean_BLD)
            z_BLD = F.normalize(mean_BLD + noise_BLD * torch.exp(0.5 * logvar_BLD), dim=-1)
            latents.append(z_BLD)
            scores.append(score(z_BLD))
            mean, logvar = mean_BLD[row_B, last_B], logvar_BLD[row_B, last_B]
            divergence = divergence + 0.25 * (mean**2 + logvar.exp() - 1 - logvar).sum(-1).mean()
        x, y = (z[row_B, last_B] for z in latents)
        score_x, score_y = (s[row_B, last_B] for s in scores)
        aux = self.config.align_weight * (divergence + pairwise_stein(x, y, score_x, score_y).mean())
        heads_BHLw = self.attention(latents[0], latents[1], item_BL == 0)
        routed_BHLd = self.experts(heads_BHLw)
        modal_BLd = F.normalize(self.fuse(routed_BHLd.transpose(1, 2).flatten(2)), dim=-1)
        out_BLd = self.final(torch.cat([id_BLd, modal_BLd], dim=-1)).clamp(-10, 10)
        return out_BLd[row_B, last_B], aux

    def loss(self, item_BL: Tensor, length_B: Tensor, target_B: Tensor) -> Tensor:
        """Cross-entropy over all V + 1 rows of the ID table, one target per sample, plus auxiliary losses."""
        user_Bd, aux = self(item_BL, length_B)
        loss: Tensor = F.cross_entropy(user_Bd @ self.items.weight.t(), target_B) + aux
        return loss


class GenericMamba(Mamba):
    """A Mamba block with mambapy's scan, or with a loop over steps if mambapy is not installed."""

    def __init__(self, dim: int, config: StreamConfig) -> None:
        super().__init__(dim, config)
        self.generic_scan = mambapy_scan
        if importlib.util.find_spec("mambapy") is None:
            self.generic_scan = unbind_scan
            say(
                "Published model: its scan is a loop over steps, as the package mambapy is not installed.\n"
                "    pip install --no-deps mambapy==1.2.0    (or: pip install -e '.[bench]')"
            )

    def forward(self, x_BLd: Tensor) -> Tensor:
        """Map `[B, L, d]` to `[B, L, d]`, causally."""
        u_BLE, z_BLE = self.in_proj(x_BLd).chunk(2, dim=-1)
        u_BLE = F.silu(causal_conv(u_BLE, self.conv_taps, self.conv_bias))
        delta_BLE, B_BLN, C_BLN = self._select(u_BLE)
        y_BLE = self.generic_scan(u_BLE, delta_BLE, self._decay_rates(), B_BLN, C_BLN, self.D, z_BLE)
        out: Tensor = self.out_proj(y_BLE)
        return out


class HeadLoop(nn.Module):
    """For each head, attention from the first latents to the second, and in reverse."""

    def __init__(self, width: int, heads: int, rate: float) -> None:
        super().__init__()
        self.heads, self.head_width = heads, width // heads
        self.enter = nn.ModuleList(
            [nn.Sequential(nn.Linear(width, width), nn.LayerNorm(width), nn.Dropout(rate)) for _ in range(2)]
        )
        self.forth, self.back = (
            nn.ModuleList(
                [
                    nn.MultiheadAttention(self.head_width, 1, dropout=rate, batch_first=True)
                    for _ in range(heads)
                ]
            )
            for _ in range(2)
        )
        self.norm = nn.LayerNorm(2 * self.head_width)

    def forward(self, x_BLD: Tensor, y_BLD: Tensor, padding_BL: Tensor) -> Tensor:
        """`[B, H, L, 2h]`."""
        enter_x, enter_y = self.enter
        factor = self.head_width**-0.5
        x_BLD = F.normalize(enter_x(x_BLD), dim=-1) * factor
        y_BLD = F.normalize(enter_y(y_BLD), dim=-1) * factor
        per_head = []
        for head in range(self.heads):
            cut = slice(head * self.head_width, (head + 1) * self.head_width)
            x_BLh, y_BLh = x_BLD[..., cut], y_BLD[..., cut]
            to_y, _ = self.forth[head](x_BLh, y_BLh, y_BLh, key_padding_mask=padding_BL, need_weights=False)
            to_x, _ = self.back[head](y_BLh, x_BLh, x_BLh, key_padding_mask=padding_BL, need_weights=False)
            per_head.append(self.norm(torch.cat([x_BLh + to_y, y_BLh + to_x], dim=-1)))
        return torch.stack(per_head, dim=1)


class ExpertLoop(nn.Module):
    """One router for all heads; for each head, each of the shared experts in turn."""

    def __init__(self, config: PublishedConfig) -> None:
        super().__init__()
        width, hidden, rate = 2 * config.modal_dim // config.heads, config.modal_dim, config.modal_dropout
        self.temperature = config.temperature
        self.router = nn.Sequential(
            nn.LayerNorm(width),
            nn.Linear(width, hidden),
            nn.GELU(),
            nn.Dropout(rate),
            nn.LayerNorm(hidden),
            nn.Linear(hidden, config.experts),
        )
        self.experts = nn.ModuleList(
            [
                nn.Sequential(nn.Linear(width, config.dim), nn.ReLU(), nn.Dropout(rate))
                for _ in range(config.experts)
            ]
        )

    def forward(self, x_BHLw: Tensor) -> Tensor:
        """`[B, H, L, d]`."""
        gates_BHLE = torch.softmax(self.router(F.normalize(x_BHLw, dim=-1)) / self.temperature, dim=-1)
        per_head = []
        for head in range(x_BHLw.shape[1]):
            mixed = None
            for n, expert in enumerate(self.experts):
                out_BLd = F.normalize(expert(x_BHLw[:, head]), dim=-1)
                part = gates_BHLE[:, head, :, n, None] * out_BLd
                mixed = part if mixed is None else mixed + part
            assert mixed is not None
            per_head.append(mixed)
        return torch.stack(per_head, dim=1)


def pairwise_stein(x_BD: Tensor, y_BD: Tensor, score_x_BD: Tensor, score_y_BD: Tensor) -> Tensor:
    """The published Stein kernel matrix `[B, B]`, with its signs, through `[B, B, D]` tensors."""
    width = x_BD.shape[1]
    difference_BBD = x_BD[:, None] - y_BD[None]
    r2_BB = difference_BBD.square().sum(-1)
    h2 = r2_BB.detach().median().sqrt().clamp(0.1, 10.0).square()
    kernel_BB = torch.exp(-r2_BB / (2 * h2))
    weighted_BBD = kernel_BB[..., None] * score_x_BD[:, None]
    both_BB = (weighted_BBD * score_y_BD[None]).sum(-1)
    drift_BB = kernel_BB * (difference_BBD * score_y_BD[None]).sum(-1) / h2
    trace_BB = kernel_BB * (r2_BB / h2**2 - width / h2)
    return both_BB + drift_BB + trace_BB


def _encoder(width: int, rate: float) -> nn.Sequential:
    """An encoder to concatenated mean and log-variance."""
    return nn.Sequential(
        nn.Linear(width, width),
        nn.LayerNorm(width),
        nn.Dropout(rate),
        nn.GELU(),
        nn.Linear(width, 2 * width),
    )


def _score_net(width: int, rate: float) -> nn.Sequential:
    return nn.Sequential(
        nn.Linear(width, 2 * width),
        nn.LayerNorm(2 * width),
        nn.Dropout(rate),
        nn.GELU(),
        nn.Linear(2 * width, width),
    )
