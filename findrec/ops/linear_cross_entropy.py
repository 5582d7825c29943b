"""Softmax cross-entropy of user vectors against the whole catalogue, exact or sampled.

The exact loss walks over tiles of rows and forms its gradients in the forward pass (the softmax of a tile
is at hand there), so no more than one tile of logits ever exists. The sampled loss estimates the partition
function without bias: a token's own candidates (its target and the items of its history, when a repeat
bonus is given) enter exactly, all other items through importance-weighted shared samples (logQ correction,
Bengio & Senecal 2008).

Shape letters: T tokens, V catalogue size, d width, B users, N distinct items of a user's history, S samples.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

DEFAULT_TILE_BYTES = 8 << 20


@dataclass(frozen=True)
class OwnBonus:
    """Additions to the logits of the items a user already met (see findrec/models/repeat.py)."""

    ids_BN: Tensor  # int64, distinct items of each user's inputs, 0 where there is none
    row_T: Tensor  # int64, the user of each token
    seen_TN: Tensor  # bool, the item occurred at or before the token
    bonus_TN: Tensor  # float, 0 where unseen; carries the gradient


def linear_cross_entropy(
    h_Td: Tensor,
    table_Vd: Tensor,
    target_T: Tensor,
    *,
    own: OwnBonus | None = None,
    tile_bytes: int = DEFAULT_TILE_BYTES,
) -> Tensor:
    """Sum over tokens of `logsumexp_v(s_tv) - s_t,target`, with `s = h table^T (+ own bonus)`.

    `table_Vd` is `[V + 1, d]`; row 0 is padding and no class. `target_T` holds ids 1..V. Returns a scalar
    in the dtype of `h_Td`; differentiable in `h_Td`, `table_Vd` and `own.bonus_TN`. Extra memory: one tile
    of logits (about `tile_bytes`) and the gradients. Raises `ValueError` for targets outside 1..V.
    """
    if target_T.numel() and (int(target_T.min()) < 1 or int(target_T.max()) >= table_Vd.shape[0]):
        raise ValueError(f"targets must lie in 1..{table_Vd.shape[0] - 1}; 0 is padding and never a target")
    bonus = own.bonus_TN if own is not None else None
    ids = own.ids_BN if own is not None else None
    row = own.row_T if own is not None else None
    loss: Tensor = _TiledCrossEntropy.apply(  # type: ignore[no-untyped-call]
        h_Td, table_Vd, bonus, target_T, ids, row, tile_bytes
    )
    return loss


class _TiledCrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        h_Td: Tensor,
        table_Vd: Tensor,
        bonus_TN: Tensor | None,
        target_T: Tensor,
        ids_BN: Tensor | None,
        row_T: Tensor | None,
        tile_bytes: int,
    ) -> Tensor:
        num_tokens, num_rows = h_Td.shape[0], table_Vd.shape[0]
        tile = max(1, min(num_tokens, tile_bytes // (num_rows * h_Td.element_size())))
        dh_Td = torch.zeros_like(h_Td)
        dtable_Vd = torch.zeros_like(table_Vd)
        dbonus_TN = torch.zeros_like(bonus_TN) if bonus_TN is not None else None
        logits_buffer = h_Td.new_empty(tile, num_rows)
        loss = h_Td.new_zeros((), dtype=torch.float64)
        for start in range(0, num_tokens, tile):
            rows = slice(start, min(start + tile, num_tokens))
            h = h_Td[rows]
            target = target_T[rows, None]
            p = torch.mm(h, table_Vd.t(), out=logits_buffer[: h.shape[0]])
            own_ids = None
            if bonus_TN is not None and ids_BN is not None and row_T is not None:
                own_ids = ids_BN[row_T[rows]]
                p.scatter_add_(1, own_ids, bonus_TN[rows])
            p[:, 0] = -torch.inf
            # From here on the one buffer turns from logits into the softmax in place.
            high = p.amax(1, keepdim=True)
            target_logit = p.gather(1, target) - high
            total = p.sub_(high).exp_().sum(1, keepdim=True)
            loss += (total.log() - target_logit).sum(dtype=torch.float64)
            p.div_(total)
            p.scatter_add_(1, target, p.new_full((1, 1), -1.0).expand_as(target))
            dh_Td[rows] = p @ table_Vd
            dtable_Vd.addmm_(p.t(), h)
            if dbonus_TN is not None and own_ids is not None:
                dbonus_TN[rows] = p.gather(1, own_ids).masked_fill_(own_ids == 0, 0.0)
        ctx.save_for_backward(dh_Td, dtable_Vd, dbonus_TN)
        return loss.to(h_Td.dtype)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        (grad,) = grads
        dh, dtable, dbonus = ctx.saved_tensors
        scaled = None if dbonus is None else dbonus * grad
        return dh * grad, dtable * grad, scaled, None, None, None, None


def sampled_cross_entropy(
    h_Td: Tensor,
    target_row_Td: Tensor,
    sample_row_Sd: Tensor,
    target_T: Tensor,
    sample_S: Tensor,
    log_expected_S: Tensor,
    *,
    own: OwnBonus | None = None,
    own_row_BNd: Tensor | None = None,
) -> Tensor:
    """Sum over tokens of `log Z_t - s_t,target` with an unbiased estimate of the partition function `Z_t`.

    `Z_t = sum over own candidates of exp(s) + sum over other samples of exp(s - log_expected)`, where
    `log_expected_S = log(S q)` of each sampled item (drawn with replacement from q). Own candidates are
    the target and, with `own`, the items seen so far; samples that hit one of them are dropped, because
    those are already counted exactly. Differentiable in all float arguments by plain autograd.
    """
    target_logit = (h_Td * target_row_Td).sum(1)
    sample_logit = h_Td @ sample_row_Sd.t() - log_expected_S
    drop_TS = sample_S[None, :] == target_T[:, None]
    parts = [target_logit[:, None]]
    if own is not None and own_row_BNd is not None:
        own_ids_TN = own.ids_BN[own.row_T]
        own_logit = _own_logits(h_Td, own_row_BNd, own.row_T) + own.bonus_TN
        is_target = own_ids_TN == target_T[:, None]
        # The target's bonus is zero where it is new to the user, so its own entry serves as its logit.
        target_logit = target_logit + (own.bonus_TN * is_target).sum(1)
        parts = [target_logit[:, None], own_logit.masked_fill(~own.seen_TN | is_target, -torch.inf)]
        drop_TS = drop_TS | _sampled_own(own, sample_S)
    parts.append(sample_logit.masked_fill(drop_TS, -torch.inf))
    return (torch.logsumexp(torch.cat(parts, 1), 1) - target_logit).sum()


def _own_logits(h_Td: Tensor, own_row_BNd: Tensor, row_T: Tensor) -> Tensor:
    """`h_t . e_n` for the own items of each token's user: one GEMM a user (tokens are grouped by user)."""
    counts = torch.bincount(row_T, minlength=own_row_BNd.shape[0]).tolist()
    pieces = [h @ rows.t() for h, rows in zip(torch.split(h_Td, counts), own_row_BNd, strict=True)]
    return torch.cat(pieces)


def _sampled_own(own: OwnBonus, sample_S: Tensor) -> Tensor:
    """`[T, S]`: the sample is an item that the token's user has seen so far."""
    # Own ids are ascending with zeros (padding) first or last; sort makes the search independent of that.
    sorted_BN, order_BN = own.ids_BN.sort(1)
    num_users, width = sorted_BN.shape
    wanted = sample_S.expand(num_users, -1).contiguous()
    place = torch.searchsorted(sorted_BN, wanted).clamp_(max=width - 1)
    found_BS = sorted_BN.gather(1, place) == wanted
    column_BS = order_BN.gather(1, place)
    return own.seen_TN.gather(1, column_BS[own.row_T]) & found_BS[own.row_T]
