"""Softmax cross-entropy of user vectors against the full catalogue, without storing all logits.

Every implementation computes `sum_t (logsumexp_v s_tv - s_t,target)` with `s = h table^T (+ repeat bonus)`.

| impl        | what                                                                                       |
|-------------|--------------------------------------------------------------------------------------------|
| `reference` | all logits under autograd, any dtype; the other is tested against it                       |
| `tiled`     | one tile of rows at a time; gradients are computed in the forward pass from the tile's     |
|             | softmax, so nothing is computed twice and nothing of size T x V is stored                  |

Computing gradients with the loss follows Liger's fused linear cross-entropy (arXiv 2410.10989).
The estimates from sampled negatives are in sampled_cross_entropy.py.

Shape letters: T tokens, V catalogue size, d width, B rows, N distinct items of a row's history, r rows of
a tile.
"""

from __future__ import annotations

from collections.abc import MutableMapping
from dataclasses import dataclass
from typing import Literal, NamedTuple

import torch
from torch import Tensor
from torch.utils.weak import WeakIdKeyDictionary

from findrec.ops._tiles import tile_bytes as tile_bytes_on
from findrec.ops.losses._eager import Gradients, eager_loss

_TILE_BYTES = 32 << 20  # on a CPU
CPU_ROWS = 512  # most tokens per tile: larger tiles are no faster and leave the cache


@dataclass(frozen=True)
class RepeatBonus:
    """Repeat-consumption terms: logit bonuses of recently seen items (see findrec/models/parts/repeat.py).

    A row is a user's history or a window of a long one; tokens of a row are contiguous, rows ascend.
    """

    ids_BN: Tensor  # int64, distinct items of the row, padded with 0
    row_T: Tensor  # int64, the row of each token
    seen_TN: Tensor  # bool, the item occurred at or before the token, within the window
    bonus_TN: Tensor  # float, 0 where unseen; carries the gradient
    longest: int | None = None  # no row has more tokens; None: not known
    # int64, distinct indices of the tokens in `[rows, longest]`, each in its row; None: not known
    slot_T: Tensor | None = None


def linear_cross_entropy(
    h_Td: Tensor,
    table_Vd: Tensor,
    target_T: Tensor,
    *,
    repeat: RepeatBonus | None = None,
    allowed_V: Tensor | None = None,
    impl: Literal["auto", "reference", "tiled"] = "auto",
    tile_bytes: int | None = None,
) -> Tensor:
    """Sum over tokens of `logsumexp_v(s_tv) - s_t,target`, in nats, with `s = h table^T (+ repeat bonus)`.

    `table_Vd` is `[V + 1, d]`; row 0 is padding, not a class. `target_T` holds ids 1..V. `allowed_V` (bool
    `[V + 1]`, entry 0 is ignored) selects the items that are classes: the others get no probability and no
    gradient. Returns a scalar in the dtype of the inputs, or in float32 for half-precision ones, which
    are computed with and summed in float32. `tiled` is differentiable once, in `h_Td`, `table_Vd` and
    `repeat.bonus_TN`.

    Extra memory of `tiled` (= `auto`): the gradients and one tile of logits, which takes `tile_bytes`
    (default: 32 MiB on a CPU, 256 MiB on a GPU) or a quarter of the table, whichever is more; half precision
    adds the inputs in float32. Raises `ValueError` for an `allowed_V` of another shape or dtype, for an
    unknown `impl` and, on a CPU, for targets that are not a class. A GPU would have to be waited for to tell:
    there such a target makes the loss infinite, or fails in a kernel if it is not a row of the table.
    """
    _check(table_Vd, target_T, allowed_V, impl)
    blocked = _blocked(target_T, allowed_V)
    if impl == "reference":
        return _dense(h_Td, table_Vd, target_T, repeat, blocked)
    bonus, ids, row = (
        (repeat.bonus_TN, repeat.ids_BN, repeat.row_T) if repeat is not None else (None, None, None)
    )

    size = tile_bytes_on(h_Td.device, _TILE_BYTES) if tile_bytes is None else tile_bytes

    def walk(tensors: tuple[Tensor | None, ...], needs_grad: tuple[bool, ...]) -> tuple[Tensor, Gradients]:
        return _walk(_Inputs(*tensors), size, needs_grad)  # type: ignore[arg-type]

    return eager_loss(walk, 3, h_Td, table_Vd, bonus, target_T, ids, row, blocked)


def _check(table_Vd: Tensor, target_T: Tensor, allowed_V: Tensor | None, impl: str) -> None:
    if impl not in ("auto", "reference", "tiled"):
        raise ValueError(f"impl={impl!r} is unknown: choose one of auto, reference, tiled")
    num_rows, on_cpu = table_Vd.shape[0], target_T.device.type == "cpu"
    if on_cpu and target_T.numel() and (int(target_T.min()) < 1 or int(target_T.max()) >= num_rows):
        raise ValueError(f"targets must lie in 1..{num_rows - 1}; 0 is padding and never a target")
    if allowed_V is None:
        return
    if allowed_V.shape != (num_rows,) or allowed_V.dtype != torch.bool:
        found = f"{allowed_V.dtype} of shape {tuple(allowed_V.shape)}"
        raise ValueError(
            f"allowed_V must be bool of shape ({num_rows},), one entry a table row; it is {found}"
        )
    if on_cpu and bool((outside := ~allowed_V[target_T]).any()):
        example = int(target_T[outside][0])
        raise ValueError(
            f"{int(outside.sum())} targets, {example} among them, are not allowed by allowed_V: "
            "a target must be a class; drop these tokens or allow their items"
        )


_blocked_of: MutableMapping[Tensor, tuple[int, Tensor]] = WeakIdKeyDictionary()


def _blocked(target_T: Tensor, allowed_V: Tensor | None) -> Tensor:
    """Ids of the rows that are not a class; the first is always padding."""
    if allowed_V is None:
        return target_T.new_zeros(1)
    version, blocked = _blocked_of.get(allowed_V, (None, target_T))
    if version != allowed_V._version:  # looked for again, at the cost of waiting for the device, if changed
        classes = allowed_V.clone()
        classes[0] = False
        blocked = (~classes).nonzero()[:, 0]
        _blocked_of[allowed_V] = allowed_V._version, blocked
    return blocked


def _dense(
    h_Td: Tensor, table_Vd: Tensor, target_T: Tensor, repeat: RepeatBonus | None, blocked: Tensor
) -> Tensor:
    logits_TV = h_Td @ table_Vd.t()
    if repeat is not None:
        logits_TV = logits_TV.scatter_add(1, repeat.ids_BN[repeat.row_T], repeat.bonus_TN)
    logits_TV = logits_TV.index_fill(1, blocked, -torch.inf)
    return (torch.logsumexp(logits_TV, 1) - logits_TV.gather(1, target_T[:, None])[:, 0]).sum()


class _Inputs(NamedTuple):
    h_Td: Tensor
    table_Vd: Tensor
    bonus_TN: Tensor | None
    target_T: Tensor
    ids_BN: Tensor | None
    row_T: Tensor | None
    blocked: Tensor  # ids that are not a class


def _walk(inputs: _Inputs, tile_bytes: int, needs_grad: tuple[bool, ...]) -> tuple[Tensor, Gradients]:
    """The loss, and the gradients of h, table and bonus that `needs_grad` selects; at least float32."""
    h_Td, table_Vd, bonus_TN, target_T, ids_BN, row_T, blocked = inputs
    dtype = torch.promote_types(h_Td.dtype, table_Vd.dtype)
    dtype = torch.float32 if dtype in (torch.bfloat16, torch.float16) else dtype
    num_tokens, num_rows = h_Td.shape[0], table_Vd.shape[0]
    table = table_Vd.to(dtype)
    tile = tile_rows(num_tokens, table, tile_bytes)
    dh_Td = torch.empty_like(h_Td, dtype=dtype) if needs_grad[0] else None
    dtable_Vd = torch.zeros_like(table) if needs_grad[1] else None
    dbonus_TN = torch.empty_like(bonus_TN, dtype=dtype) if needs_grad[2] and bonus_TN is not None else None
    buffer = table.new_empty(tile, num_rows)
    loss = table.new_zeros((), dtype=torch.float64)
    # `out=` and in-place products are also exempt from autocast.
    for start in range(0, num_tokens, tile):
        rows = slice(start, min(start + tile, num_tokens))
        h = h_Td[rows].to(dtype)
        target = target_T[rows, None]
        candidate_ids = ids_BN[row_T[rows]] if ids_BN is not None and row_T is not None else None
        p = torch.mm(h, table.t(), out=buffer[: h.shape[0]])
        if candidate_ids is not None and bonus_TN is not None:
            p.scatter_add_(1, candidate_ids, bonus_TN[rows].to(dtype))
        p.index_fill_(1, blocked, -torch.inf)
        # In place: the buffer's logits become exp(s - max).
        high = p.amax(1, keepdim=True)
        target_logit = p.gather(1, target) - high
        total = p.sub_(high).exp_().sum(1, keepdim=True)
        loss += (total.log() - target_logit).sum(dtype=torch.float64)
        # (softmax - one-hot of the target) * total: dividing the narrow operands by `total` saves a pass
        # over the tile.
        p.scatter_add_(1, target, -total)
        if dh_Td is not None:
            torch.mm(p, table, out=dh_Td[rows]).div_(total)
        if dtable_Vd is not None:
            dtable_Vd.addmm_(p.t(), h / total)
        if dbonus_TN is not None and candidate_ids is not None:
            dbonus_TN[rows] = p.gather(1, candidate_ids).div_(total)
    return loss.to(dtype), (dh_Td, dtable_Vd, dbonus_TN)


def tile_rows(num_tokens: int, table_Vd: Tensor, tile_bytes: int) -> int:
    """Number of tokens in a tile of logits against `table_Vd`."""
    num_rows, width = table_Vd.shape
    # Every tile updates the full gradient of the table once: below a quarter of the width in rows that update
    # costs more than the tile itself, to save memory that the gradient needs anyway.
    rows = max(tile_bytes // (num_rows * table_Vd.element_size()), width // 4, 1)
    if table_Vd.device.type == "cpu":
        rows = min(rows, CPU_ROWS)
    return max(1, min(num_tokens, rows))
