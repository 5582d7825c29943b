"""Softmax cross-entropy of user vectors against the whole catalogue, without ever holding its logits.

Every implementation computes `sum_t (logsumexp_v s_tv - s_t,target)` with `s = h table^T (+ own bonus)`.

| impl        | what                                                                                       |
|-------------|--------------------------------------------------------------------------------------------|
| `reference` | all logits under autograd, any dtype: what the other is tested against                     |
| `tiled`     | a tile of rows at a time; its gradients are formed in the forward pass, while its softmax  |
|             | is at hand, so that nothing is computed twice and nothing of the size T x V is kept        |

Forming gradients with the loss is the idea of Liger's fused linear cross-entropy (arXiv 2410.10989).
The estimates from sampled negatives are in sampled_cross_entropy.py.

Shape letters: T tokens, V catalogue size, d width, B rows, N distinct items of a row's history, r rows of
a tile.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, NamedTuple

import torch
from torch import Tensor

from findrec.ops._eager import Gradients, eager_loss

DEFAULT_TILE_BYTES = 32 << 20
CPU_ROWS = 512  # of a tile at most: more do not speed the products up and push the tile out of the cache


@dataclass(frozen=True)
class OwnBonus:
    """Additions to the logits of the items a user met lately (see findrec/models/repeat.py).

    A row is a user's history, or a piece of a long one; tokens of a row stand together, rows ascend.
    """

    ids_BN: Tensor  # int64, distinct items that tokens of the row may have met, 0 where there is none
    row_T: Tensor  # int64, the row of each token
    seen_TN: Tensor  # bool, the item occurred at or before the token, lately enough to count
    bonus_TN: Tensor  # float, 0 where unseen; carries the gradient


def linear_cross_entropy(
    h_Td: Tensor,
    table_Vd: Tensor,
    target_T: Tensor,
    *,
    own: OwnBonus | None = None,
    allowed_V: Tensor | None = None,
    impl: Literal["auto", "reference", "tiled"] = "auto",
    tile_bytes: int = DEFAULT_TILE_BYTES,
) -> Tensor:
    """Sum over tokens of `logsumexp_v(s_tv) - s_t,target`, in nats, with `s = h table^T (+ own bonus)`.

    `table_Vd` is `[V + 1, d]`; row 0 is padding and no class. `target_T` holds ids 1..V. `allowed_V` (bool
    `[V + 1]`, entry 0 is ignored) leaves only some items as classes: the others get neither probability
    nor gradient. Returns a scalar in the dtype of the inputs, or in float32 for half-precision ones, which
    are computed with and summed in float32. `tiled` is differentiable once, in `h_Td`, `table_Vd` and
    `own.bonus_TN`.

    Extra memory of `tiled` (= `auto`): the gradients and one tile of logits, which takes `tile_bytes` or a
    quarter of the table, whichever is more; half precision adds the inputs in float32. Raises `ValueError`
    for targets that are no class, for an `allowed_V` of another shape or dtype, and for an unknown `impl`.
    """
    _check(table_Vd, target_T, allowed_V, impl)
    blocked = target_T.new_zeros(1) if allowed_V is None else _blocked(allowed_V)
    if impl == "reference":
        return _dense(h_Td, table_Vd, target_T, own, blocked)
    bonus, ids, row = (own.bonus_TN, own.ids_BN, own.row_T) if own is not None else (None, None, None)

    def walk(tensors: tuple[Tensor | None, ...], wanted: tuple[bool, ...]) -> tuple[Tensor, Gradients]:
        return _walk(_Inputs(*tensors), tile_bytes, wanted)  # type: ignore[arg-type]

    return eager_loss(walk, 3, h_Td, table_Vd, bonus, target_T, ids, row, blocked)


def _check(table_Vd: Tensor, target_T: Tensor, allowed_V: Tensor | None, impl: str) -> None:
    if impl not in ("auto", "reference", "tiled"):
        raise ValueError(f"impl={impl!r} is unknown: choose one of auto, reference, tiled")
    num_rows = table_Vd.shape[0]
    if target_T.numel() and (int(target_T.min()) < 1 or int(target_T.max()) >= num_rows):
        raise ValueError(f"targets must lie in 1..{num_rows - 1}; 0 is padding and never a target")
    if allowed_V is None:
        return
    if allowed_V.shape != (num_rows,) or allowed_V.dtype != torch.bool:
        found = f"{allowed_V.dtype} of shape {tuple(allowed_V.shape)}"
        raise ValueError(
            f"allowed_V must be bool of shape ({num_rows},), one entry a table row; it is {found}"
        )
    outside = ~allowed_V[target_T]
    if bool(outside.any()):
        example = int(target_T[outside][0])
        raise ValueError(
            f"{int(outside.sum())} targets, {example} among them, are not allowed by allowed_V: "
            "a target must be a class; drop these tokens or allow their items"
        )


def _blocked(allowed_V: Tensor) -> Tensor:
    """Ids of the rows that are no class; padding is always the first."""
    classes = allowed_V.clone()
    classes[0] = False
    return (~classes).nonzero()[:, 0]


def _dense(h_Td: Tensor, table_Vd: Tensor, target_T: Tensor, own: OwnBonus | None, blocked: Tensor) -> Tensor:
    logits_TV = h_Td @ table_Vd.t()
    if own is not None:
        logits_TV = logits_TV.scatter_add(1, own.ids_BN[own.row_T], own.bonus_TN)
    logits_TV = logits_TV.index_fill(1, blocked, -torch.inf)
    return (torch.logsumexp(logits_TV, 1) - logits_TV.gather(1, target_T[:, None])[:, 0]).sum()


class _Inputs(NamedTuple):
    h_Td: Tensor
    table_Vd: Tensor
    bonus_TN: Tensor | None
    target_T: Tensor
    ids_BN: Tensor | None
    row_T: Tensor | None
    blocked: Tensor  # ids that are no class


def _walk(inputs: _Inputs, tile_bytes: int, wanted: tuple[bool, ...]) -> tuple[Tensor, Gradients]:
    """The loss and the `wanted` gradients in h, table and bonus, in the dtype that is computed in."""
    h_Td, table_Vd, bonus_TN, target_T, ids_BN, row_T, blocked = inputs
    dtype = torch.promote_types(h_Td.dtype, table_Vd.dtype)
    dtype = torch.float32 if dtype in (torch.bfloat16, torch.float16) else dtype
    num_tokens, num_rows = h_Td.shape[0], table_Vd.shape[0]
    table = table_Vd.to(dtype)
    tile = tile_rows(num_tokens, table, tile_bytes)
    dh_Td = torch.empty_like(h_Td, dtype=dtype) if wanted[0] else None
    dtable_Vd = torch.zeros_like(table) if wanted[1] else None
    dbonus_TN = torch.empty_like(bonus_TN, dtype=dtype) if wanted[2] and bonus_TN is not None else None
    buffer = table.new_empty(tile, num_rows)
    loss = table.new_zeros((), dtype=torch.float64)
    # Products write into given tensors (`out=`, in place) also because autocast leaves such ones alone.
    for start in range(0, num_tokens, tile):
        rows = slice(start, min(start + tile, num_tokens))
        h = h_Td[rows].to(dtype)
        target = target_T[rows, None]
        own_ids = ids_BN[row_T[rows]] if ids_BN is not None and row_T is not None else None
        p = torch.mm(h, table.t(), out=buffer[: h.shape[0]])
        if own_ids is not None and bonus_TN is not None:
            p.scatter_add_(1, own_ids, bonus_TN[rows].to(dtype))
        p.index_fill_(1, blocked, -torch.inf)
        # From here on the one buffer turns from logits into exp(s - max), in place.
        high = p.amax(1, keepdim=True)
        target_logit = p.gather(1, target) - high
        total = p.sub_(high).exp_().sum(1, keepdim=True)
        loss += (total.log() - target_logit).sum(dtype=torch.float64)
        # The softmax minus the target's one-hot, times `total`: dividing the narrow operands by it
        # saves a pass over the tile.
        p.scatter_add_(1, target, -total)
        if dh_Td is not None:
            torch.mm(p, table, out=dh_Td[rows]).div_(total)
        if dtable_Vd is not None:
            dtable_Vd.addmm_(p.t(), h / total)
        if dbonus_TN is not None and own_ids is not None:
            dbonus_TN[rows] = p.gather(1, own_ids).div_(total)
    return loss.to(dtype), (dh_Td, dtable_Vd, dbonus_TN)


def tile_rows(num_tokens: int, table_Vd: Tensor, tile_bytes: int) -> int:
    """Tokens of a tile of logits against `table_Vd`."""
    num_rows, width = table_Vd.shape
    # Every tile goes once through the whole gradient of the table: with fewer rows than a part of its
    # width that costs more than the tile itself, and saves memory that the gradient takes anyway.
    rows = max(tile_bytes // (num_rows * table_Vd.element_size()), width // 4, 1)
    if table_Vd.device.type == "cpu":
        rows = min(rows, CPU_ROWS)
    return max(1, min(num_tokens, rows))
