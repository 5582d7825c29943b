"""Small layers shared by several models."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from findrec.datasets.batches.batch import Batch
from findrec.errors import FindRecError
from findrec.models.parts.activation_checkpointing import CheckpointedModule

NUM_GAP_BUCKETS = 40  # log2 of seconds: 2^39 s is 17,000 years


class Dropout(nn.Module):
    """Inverted dropout, on a CPU with one random byte per element.

    PyTorch draws a 32-bit number for each, which on a CPU costs as much as the layer before it. The rate is
    rounded to a multiple of 1/256 and the scale is computed from that rate, so the expectation is exact.
    """

    def __init__(self, rate: float) -> None:
        super().__init__()
        self.dropped = round(rate * 256)  # number of byte values, of 256, that drop an element

    def forward(self, x: Tensor) -> Tensor:
        """Drop elements of `x` and scale up the others; the identity in evaluation mode."""
        if not self.training or self.dropped == 0:
            return x
        if x.device.type != "cpu":  # one kernel that draws, drops and scales
            return F.dropout(x, self.dropped / 256)
        words = torch.empty(-(-x.numel() // 8), dtype=torch.int64, device=x.device)
        words.random_(torch.iinfo(torch.int64).min, None)  # all 64 bits
        byte = words.view(torch.uint8)[: x.numel()].view(x.shape)
        # Written as floats directly: converting a bool mask would take another pass.
        keep = torch.ge(byte, self.dropped, out=torch.empty_like(x, requires_grad=False))
        return x * keep.mul_(256 / (256 - self.dropped))


class Inputs(nn.Module):
    """The input at every event: its item row times sqrt(d), plus optional embeddings of time gap and type.

    Rows are initialised small, so that scores start near zero; the factor gives inputs of the usual scale
    (Vaswani et al. 2017, section 3.4).
    """

    def __init__(self, dim: int, dropout: float, *, gaps: bool, num_event_types: int = 0) -> None:
        """With `num_event_types` 0 event types are not an input."""
        super().__init__()
        self.scale = dim**0.5
        self.dropout = Dropout(dropout)
        self.gap = nn.Embedding(NUM_GAP_BUCKETS, dim) if gaps else None
        self.event = nn.Embedding(num_event_types + 2, dim) if num_event_types else None
        for embedding in (self.gap, self.event):
            if embedding is not None:
                nn.init.normal_(embedding.weight, std=0.1)

    def forward(self, batch: Batch, x_items_Ud: Tensor) -> Tensor:
        """The inputs `[B, L, d]`, without dropout (see `drop`)."""
        x_BLd: Tensor = F.embedding(batch.index, x_items_Ud) * self.scale
        if self.gap is not None:
            if batch.gap is None:
                raise FindRecError(
                    "model.gaps is true, but the data has no timestamps to compute time gaps from; "
                    "set model.gaps=false"
                )
            x_BLd = x_BLd + self.gap(batch.gap.clamp(0, NUM_GAP_BUCKETS - 1))
        if self.event is not None:
            if batch.event is None:
                raise ValueError("model.events needs batches with event types (Batch.event)")
            x_BLd = x_BLd + self.event(batch.event)
        return x_BLd

    def drop(self, x_BLd: Tensor) -> Tensor:
        """Input dropout, to be applied after everything is added."""
        dropped: Tensor = self.dropout(x_BLd)
        return dropped


class LayerScale(nn.Module):
    """A learned gain per channel of a residual branch, initially small (Touvron et al. 2021)."""

    def __init__(self, dim: int, initial: float = 0.1) -> None:
        super().__init__()
        self.gain = nn.Parameter(torch.full((dim,), initial))

    def forward(self, x: Tensor) -> Tensor:
        """`x * gain`."""
        return x * self.gain


class ResidualStream(CheckpointedModule):
    """Residual layers of [LayerNorm, block, dropout, LayerScale]; blocks may return `(output, state)`."""

    def __init__(self, dim: int, dropout: float, blocks: Sequence[nn.Module]) -> None:
        super().__init__()
        self.norms = nn.ModuleList([nn.LayerNorm(dim) for _ in blocks])
        self.blocks = nn.ModuleList(blocks)
        self.scales = nn.ModuleList([LayerScale(dim) for _ in blocks])
        self.dropout = Dropout(dropout)

    def forward(self, x_BLd: Tensor) -> Tensor:
        """`[B, L, d]` to `[B, L, d]`, causal if the blocks are."""
        for layer in zip(self.norms, self.blocks, self.scales, strict=True):
            x_BLd = self.run_layer(self._layer, x_BLd, *layer)
        return x_BLd

    def _layer(self, x_BLd: Tensor, norm: nn.Module, block: nn.Module, scale: nn.Module) -> Tensor:
        y_BLd = block(norm(x_BLd))
        if isinstance(y_BLd, tuple):
            y_BLd = y_BLd[0]
        sum_BLd: Tensor = x_BLd + scale(self.dropout(y_BLd))
        return sum_BLd


def project_normed(norm: nn.LayerNorm, project: nn.Linear, values_nM: Tensor) -> Tensor:
    """`project(norm(values))` for wide rows that need no gradient, such as features.

    Computed as `W (g x + b) + c = (W g) x + (W b + c)`: gradients of gain and shift are then derived from
    that of the matrix, and no gradient of the features' width is needed per row.
    """
    normed_nM = F.layer_norm(values_nM, norm.normalized_shape, eps=norm.eps)
    bias = project.weight @ norm.bias
    if project.bias is not None:
        bias = bias + project.bias
    return F.linear(normed_nM, project.weight * norm.weight, bias)


class _GatherRows(torch.autograd.Function):
    """`x[index]` for distinct indices: the backward pass copies rows, where `index_select` would add them."""

    @staticmethod
    def forward(ctx: Any, x_nd: Tensor, index_T: Tensor) -> Tensor:
        ctx.save_for_backward(index_T)
        ctx.num_rows = len(x_nd)
        return x_nd.index_select(0, index_T)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        (index_T,) = ctx.saved_tensors
        dx_nd = grads[0].new_zeros(ctx.num_rows, *grads[0].shape[1:])
        return dx_nd.index_copy_(0, index_T, grads[0]), None


def gather_positions(x_BLd: Tensor, batch: Batch) -> Tensor:
    """The rows `[T, ...]` of `[B, L, ...]` at the target positions of the batch (`batch.position`)."""
    x_nd = x_BLd.flatten(0, 1)
    if len(batch.position) == len(x_nd):
        return x_nd  # positions are distinct and ascending
    rows_Td: Tensor = _GatherRows.apply(x_nd, batch.position)  # type: ignore[no-untyped-call]
    return rows_Td


class WaitTimeModulation(nn.Module):
    """Modulates a user vector by the time since the last event: a gain and a shift per time bucket.

    Whether the next event follows at once (the same basket) or days later (a new one) is known at prediction
    time, and changes what comes next. Initially the identity.
    """

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.change = nn.Embedding(NUM_GAP_BUCKETS, 2 * dim)
        nn.init.zeros_(self.change.weight)

    def forward(self, h_Td: Tensor, batch: Batch) -> Tensor:
        """User vectors `[T, d]` modulated by the wait times of the batch (`batch.wait`)."""
        if batch.wait is None:
            raise ValueError("model.wait needs batches with wait times (Batch.wait)")
        return self.at(h_Td, batch.wait)

    def at(self, h_Td: Tensor, wait_T: Tensor) -> Tensor:
        """The same for given buckets of wait time `[T]`."""
        gain_Td, shift_Td = self.change(wait_T).chunk(2, dim=1)
        changed: Tensor = h_Td * (1.0 + gain_Td) + shift_Td
        return changed
