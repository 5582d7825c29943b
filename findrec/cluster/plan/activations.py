"""Measures the memory that a model takes to train one microbatch.

The model runs forward and backward on the CPU while the storages of all tensors are counted, so nothing here
depends on its structure. Memory of the catalogue loss and of the repeat-consumption bonuses, which do not
belong to the model, is computed from sizes.
"""

from __future__ import annotations

import weakref
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from findrec.config import RunConfig
from findrec.models.base import Microbatch, Model, TableShape
from findrec.models.parts.repeat import REPEAT_WINDOW
from findrec.ops._tiles import tile_bytes
from findrec.ops.losses.linear_cross_entropy import CPU_ROWS, RepeatBonus
from findrec.ops.repeat_bonus import NUM_REPEAT_FEATURES
from findrec.tables.base import CatalogueLoss, Transform
from findrec.tables.view import Tables

FLOAT = 4
_TENSOR_BYTES = 1024  # overhead per tensor, with its node of the autograd graph
# The C++ kernel stores no features of repeat candidates; on GPUs they are stored twice, with dense counts.
_BONUS = FLOAT + FLOAT + 1  # bytes per target and candidate: bonus, its gradient, whether it was seen


@dataclass(frozen=True)
class MicrobatchShape:
    """The sizes of a microbatch that determine the memory of the catalogue loss."""

    rows: int
    length: int  # of the longest row, to which all rows are padded
    targets: int
    distinct: int  # items, padding included

    @property
    def positions(self) -> int:
        """Number of positions, padding included."""
        return self.rows * self.length


class _LiveBytes(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Counts the bytes of the live tensors created by operations."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._alive: dict[int, int] = {}
        self._now = self.peak = 0

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Any = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        result = func(*args, **(kwargs or {}))
        for value in tree_leaves(result):
            if isinstance(value, Tensor) and value.layout is torch.strided:  # others are views of such
                self._count(value.untyped_storage())
        return result

    def _count(self, storage: torch.UntypedStorage) -> None:
        key = storage._cdata
        if key in self._alive:
            return
        self._alive[key] = storage.nbytes() + _TENSOR_BYTES
        self._now += self._alive[key]
        self.peak = max(self.peak, self._now)
        weakref.finalize(storage, self._forget, key)

    def _forget(self, key: int) -> None:
        self._now -= self._alive.pop(key, 0)


class _SizedTable:
    """A stand-in for a table: of the right width but without rows, and with a loss that takes no memory."""

    sharded = False
    first_row = 0

    def __init__(self, shape: TableShape) -> None:
        self.weight = torch.zeros(1, shape.dim)

    def lookup(self, ids_U: Tensor) -> Tensor:
        return torch.full((len(ids_U), self.weight.shape[1]), 0.01).requires_grad_()

    def push(self, ids_U: Tensor | None, grad_Ud: Tensor) -> None:
        pass

    def catalogue_loss(
        self,
        h_Td: Tensor,
        target_T: Tensor,
        num_targets: int,
        *,
        repeat: RepeatBonus | None = None,
        generator: torch.Generator | None = None,
        transform: Transform | None = None,
    ) -> CatalogueLoss:
        bonus = None if repeat is None else torch.zeros_like(repeat.bonus_TN)
        return CatalogueLoss(h_Td.new_zeros(()), torch.zeros_like(h_Td), bonus, None)


def measure_microbatch(
    model: Model[Any], shapes: Mapping[str, TableShape], microbatch: Microbatch[Any]
) -> int:
    """Peak bytes of a forward and backward pass, without weights, their gradients and the catalogue loss.

    Within a factor of 2 of the memory growth of a process, as a test checks. Clears the gradients of the
    model and preserves torch's random state.
    """
    tables: Any = {name: _SizedTable(shape) for name, shape in shapes.items()}
    weights = list(model.parameters())
    with torch.random.fork_rng(devices=[]), _LiveBytes() as live:
        views = Tables(tables, microbatch.num_targets, microbatch.seed)
        model.loss(microbatch, views).total.backward()  # type: ignore[no-untyped-call]
    gradients = sum(p.grad.untyped_storage().nbytes() for p in weights if p.grad is not None)
    for parameter in weights:
        parameter.grad = None
    return max(0, int(live.peak - gradients))


def repeat_bonus_bytes(config: RunConfig, shape: MicrobatchShape, *, on_gpu: bool = False) -> int:
    """Bytes of the repeat-consumption bonuses of every target and distinct item of its history."""
    if not config.model.repeat_consumption:
        return 0
    repeat = min(shape.length, REPEAT_WINDOW + REPEAT_WINDOW // 4, shape.distinct)
    features = 2 * NUM_REPEAT_FEATURES * FLOAT if on_gpu else 0
    return shape.targets * repeat * (_BONUS + features)


def loss_bytes(
    config: RunConfig,
    feature_dims: Mapping[str, int],
    shape: MicrobatchShape,
    rows: int,
    *,
    row_width: int | None = None,
    on_gpu: bool = False,
) -> int:
    """Bytes of the catalogue loss: a tile of logits, and the gradients of user and item vectors.

    `rows` is the number of local table rows and `row_width` their width (default: that of item vectors);
    `feature_dims` are the widths of the modalities.
    """
    loss, d = config.training.loss, config.model.vector_dim(feature_dims)
    device = "cuda" if on_gpu else "cpu"
    if loss.kind == "exact":
        tile_rows = max(tile_bytes(device, loss.tile_mib << 20) // (rows * FLOAT), d // 4, 1)
        tile = min(tile_rows, shape.targets if on_gpu else min(shape.targets, CPU_ROWS)) * rows
        scored = rows
    else:
        scored = min(loss.negatives + shape.targets + shape.distinct, rows)
        tile = tile_bytes(device, 2 << 20) // FLOAT
        if loss.kind == "gbce":
            tile = shape.targets * loss.negatives * 4
        elif on_gpu:  # the whole microbatch in one tile if it fits, masks of samples beside it
            tile = 4 * min(tile, shape.targets * (loss.negatives + shape.distinct))
    width = d if row_width is None else row_width
    floats = tile + scored * width + 2 * shape.targets * d
    if loss.kind != "exact":
        floats += 2 * (scored * width + (shape.targets + shape.distinct) * d)  # rows, and copies by role
    if config.model.scores_content and feature_dims:
        # Content added to the scored rows: values, normalised values, vectors.
        floats += scored * (sum(2 * width + 2 * d for width in feature_dims.values()) + 2 * d)
    return FLOAT * floats
