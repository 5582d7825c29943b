"""Small parts that several models share."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from findrec.datasets.batch import Batch
from findrec.errors import FindRecError

NUM_GAP_BUCKETS = 40  # log2 of seconds: 2^39 s is 17,000 years


class Dropout(nn.Module):
    """Inverted dropout whose mask takes one random byte an element.

    PyTorch draws a whole number for each, which on a CPU costs as much as the layer around it. The rate is
    rounded to a multiple of 1/256 and the gain made for that rate, so the expectation is exact.
    """

    def __init__(self, rate: float) -> None:
        super().__init__()
        self.dropped = round(rate * 256)  # byte values, of 256, that mean "drop"

    def forward(self, x: Tensor) -> Tensor:
        """`x` with some elements zero and the others scaled up; `x` itself in evaluation mode."""
        if not self.training or self.dropped == 0:
            return x
        words = torch.empty(-(-x.numel() // 8), dtype=torch.int64, device=x.device)
        words.random_(torch.iinfo(torch.int64).min, None)  # all 64 bits
        byte = words.view(torch.uint8)[: x.numel()].view(x.shape)
        # Written as numbers at once: a mask of bools would take another pass to become some.
        keep = torch.ge(byte, self.dropped, out=torch.empty_like(x, requires_grad=False))
        return x * keep.mul_(256 / (256 - self.dropped))


class Inputs(nn.Module):
    """Item-table rows (times sqrt(d)) at every event; embeddings of time gap and event type when asked for.

    The table starts small, so that scores start near zero; the factor gives the network inputs of a usual
    size (Vaswani et al. 2017, section 3.4).
    """

    def __init__(self, dim: int, dropout: float, *, gaps: bool, num_event_types: int = 0) -> None:
        """`num_event_types` 0: types are no input."""
        super().__init__()
        self.scale = dim**0.5
        self.dropout = Dropout(dropout)
        self.gap = nn.Embedding(NUM_GAP_BUCKETS, dim) if gaps else None
        self.event = nn.Embedding(num_event_types + 2, dim) if num_event_types else None
        for embedding in (self.gap, self.event):
            if embedding is not None:
                nn.init.normal_(embedding.weight, std=0.1)

    def forward(self, batch: Batch, x_items_Ud: Tensor) -> Tensor:
        """`[B, L, d]` inputs, without dropout: see `drop`."""
        x_BLd: Tensor = F.embedding(batch.index, x_items_Ud) * self.scale
        if self.gap is not None:
            if batch.gap is None:
                raise FindRecError(
                    "model.gaps is true, but the data has no timestamps to take time gaps from; "
                    "set model.gaps=false"
                )
            x_BLd = x_BLd + self.gap(batch.gap.clamp(0, NUM_GAP_BUCKETS - 1))
        if self.event is not None:
            if batch.event is None:
                raise ValueError("model.events needs batches that carry the types of events (Batch.event)")
            x_BLd = x_BLd + self.event(batch.event)
        return x_BLd

    def drop(self, x_BLd: Tensor) -> Tensor:
        """Input dropout, after whatever else the model adds."""
        dropped: Tensor = self.dropout(x_BLd)
        return dropped


class LayerScale(nn.Module):
    """A learned gain for each channel of a residual branch, starting small (Touvron et al. 2021)."""

    def __init__(self, dim: int, initial: float = 0.1) -> None:
        super().__init__()
        self.gain = nn.Parameter(torch.full((dim,), initial))

    def forward(self, x: Tensor) -> Tensor:
        """`x * gain`."""
        return x * self.gain


def project_normed(norm: nn.LayerNorm, project: nn.Linear, values_nM: Tensor) -> Tensor:
    """`project(norm(values))` of rows that need no gradient, such as features, which are wide.

    `W (g x + b) + c = (W g) x + (W b + c)`: gain and shift join the matrix, so that their gradients come from
    its own, and not by way of a product that gives every row a gradient of the features' width.
    """
    normed_nM = F.layer_norm(values_nM, norm.normalized_shape, eps=norm.eps)
    bias = project.weight @ norm.bias
    if project.bias is not None:
        bias = bias + project.bias
    return F.linear(normed_nM, project.weight * norm.weight, bias)


class _TakeRows(torch.autograd.Function):
    """`x[place]` for distinct places: the gradient is a copy, where `index_select` adds one by one."""

    @staticmethod
    def forward(ctx: Any, x_nd: Tensor, place_T: Tensor) -> Tensor:
        ctx.save_for_backward(place_T)
        ctx.num_rows = len(x_nd)
        return x_nd.index_select(0, place_T)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        (place_T,) = ctx.saved_tensors
        dx_nd = grads[0].new_zeros(ctx.num_rows, *grads[0].shape[1:])
        return dx_nd.index_copy_(0, place_T, grads[0]), None


def asked_rows(x_BLd: Tensor, batch: Batch) -> Tensor:
    """`[T, ...]`: the rows of `[B, L, ...]` at the positions the batch asks for."""
    x_nd = x_BLd.flatten(0, 1)
    if len(batch.position) == len(x_nd):
        return x_nd  # positions are distinct and ascend, so these are all of them
    rows_Td: Tensor = _TakeRows.apply(x_nd, batch.position)  # type: ignore[no-untyped-call]
    return rows_Td


class Moment(nn.Module):
    """Lets a user vector depend on when it is asked for: a gain and a shift for each bucket of waiting time.

    Whether the next event follows at once (the same basket) or days later (a new one) is known to whoever
    asks, and changes what comes next. Starts as the identity.
    """

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.change = nn.Embedding(NUM_GAP_BUCKETS, 2 * dim)
        nn.init.zeros_(self.change.weight)

    def forward(self, h_Td: Tensor, batch: Batch) -> Tensor:
        """`[T, d]` user vectors, each at its own waiting time (`batch.wait`)."""
        if batch.wait is None:
            raise ValueError("model.wait needs batches that carry the time of asking (Batch.wait)")
        return self.at(h_Td, batch.wait)

    def at(self, h_Td: Tensor, wait_T: Tensor) -> Tensor:
        """The same with the buckets of waiting time given."""
        gain_Td, shift_Td = self.change(wait_T).chunk(2, dim=1)
        changed: Tensor = h_Td * (1.0 + gain_Td) + shift_Td
        return changed
