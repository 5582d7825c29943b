"""Losses of user vectors against negatives that a microbatch shares: sampled softmax and gBCE.

`sampled_cross_entropy` estimates the partition function of the full softmax without bias: a token's own
candidates (its target and the items of its history, when a repeat bonus is given) enter exactly, all other
items through importance-weighted samples (logQ correction; Bengio & Senecal, IEEE Trans. Neural Networks
19(4), 2008). `generalised_bce` is the loss of gSASRec (Petrov & Macdonald, arXiv 2308.07192).

Both take rows of the item table rather than the table, so that gradients stay as small as the sample. gBCE is
plain autograd over `[T, S]`; the sampled softmax has two implementations:

| impl        | what                                                                                       |
|-------------|--------------------------------------------------------------------------------------------|
| `reference` | all logits under autograd, any dtype: what the other is tested against                     |
| `tiled`     | a tile of tokens at a time in one buffer, gradients formed in the forward pass             |
|             | (`_sampled_tiles`, as in linear_cross_entropy.py); nothing of the size T x S is kept       |

Shape letters: T tokens, V catalogue size, d width, B users, N distinct items of a user's history, S samples.
"""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor
from torch.nn import functional as F

from findrec.ops._eager import Gradients, eager_loss
from findrec.ops._sampled_tiles import NUM_FLOATS, Inputs, walk_tiles
from findrec.ops.linear_cross_entropy import OwnBonus

DEFAULT_TILE_BYTES = 2 << 20  # the passes over a tile want it in the processor's cache


def sampled_cross_entropy(
    h_Td: Tensor,
    target_row_Td: Tensor,
    sample_row_Sd: Tensor,
    target_T: Tensor,
    sample_S: Tensor,
    log_expected_S: Tensor | None = None,
    *,
    own: OwnBonus | None = None,
    own_row_BNd: Tensor | None = None,
    impl: Literal["auto", "reference", "tiled"] = "auto",
    tile_bytes: int = DEFAULT_TILE_BYTES,
) -> Tensor:
    """Sum over tokens of `log Z_t - s_t,target` with an unbiased estimate of the partition function `Z_t`.

    `Z_t = sum over own candidates of exp(s) + sum over other samples of exp(s - log_expected)`, where
    `log_expected_S = log(S q)` of each sampled item (drawn with replacement from q). Without it nothing is
    corrected: the samples are the candidates of a softmax over a subset, and should be distinct. Own
    candidates are the target and, with `own`, the items seen so far; samples that hit one of them are
    dropped, because those are already counted exactly. Tokens of a user lie together, users ascending.

    Returns a scalar in the dtype of the inputs; `tiled` (= `auto`) computes half precision in float32 and
    returns that. `tiled` is differentiable once, in `h_Td`, the three kinds of rows and `own.bonus_TN`, and
    takes `tile_bytes` beside the gradients; `reference` also in `log_expected_S`.
    Raises `ValueError` when only one of `own` and `own_row_BNd` is given, for an unknown `impl`, and when
    `tiled` is asked for a gradient in `log_expected_S`.
    """
    if (own is None) != (own_row_BNd is None):
        raise ValueError(
            "own and own_row_BNd must be given together: the rows of own.ids_BN are scored exactly"
        )
    if impl not in ("auto", "reference", "tiled"):
        raise ValueError(f"impl={impl!r} is unknown: choose one of auto, reference, tiled")
    if impl == "reference":
        return _dense(
            h_Td, target_row_Td, sample_row_Sd, target_T, sample_S, log_expected_S, own, own_row_BNd
        )
    if log_expected_S is not None and log_expected_S.requires_grad:
        raise ValueError("log_expected_S: only impl='reference' gives it a gradient; detach it")
    bonus, ids, row, seen = (
        (None, None, None, None) if own is None else (own.bonus_TN, own.ids_BN, own.row_T, own.seen_TN)
    )
    floats = (h_Td, target_row_Td, sample_row_Sd, own_row_BNd, bonus)

    def walk(tensors: tuple[Tensor | None, ...], wanted: tuple[bool, ...]) -> tuple[Tensor, Gradients]:
        return walk_tiles(Inputs(*tensors), tile_bytes, wanted)  # type: ignore[arg-type]

    others = (target_T, sample_S, log_expected_S, ids, row, seen)
    return eager_loss(walk, NUM_FLOATS, *floats, *others)


def _dense(
    h_Td: Tensor,
    target_row_Td: Tensor,
    sample_row_Sd: Tensor,
    target_T: Tensor,
    sample_S: Tensor,
    log_expected_S: Tensor | None,
    own: OwnBonus | None,
    own_row_BNd: Tensor | None,
) -> Tensor:
    target_logit = (h_Td * target_row_Td).sum(1)
    sample_logit = h_Td @ sample_row_Sd.t()
    if log_expected_S is not None:
        sample_logit = sample_logit - log_expected_S
    drop_TS = sample_S[None, :] == target_T[:, None]
    parts = [target_logit[:, None]]
    if own is not None and own_row_BNd is not None:
        own_logit = _own_logits(h_Td, own_row_BNd, own.row_T) + own.bonus_TN
        is_target = own.ids_BN[own.row_T] == target_T[:, None]
        # The target's bonus is zero where it is new to the user, so its own entry serves as its logit.
        target_logit = target_logit + (own.bonus_TN * is_target).sum(1)
        parts = [target_logit[:, None], own_logit.masked_fill(~own.seen_TN | is_target, -torch.inf)]
        column_TS, found_TS = _find_own(own, sample_S)
        drop_TS = drop_TS | (own.seen_TN.gather(1, column_TS) & found_TS)
    parts.append(sample_logit.masked_fill(drop_TS, -torch.inf))
    return (torch.logsumexp(torch.cat(parts, 1), 1) - target_logit).sum()


def generalised_bce(
    h_Td: Tensor,
    target_row_Td: Tensor,
    sample_row_Sd: Tensor,
    target_T: Tensor,
    sample_S: Tensor,
    *,
    num_items: int,
    calibration: float = 0.75,
    own: OwnBonus | None = None,
) -> Tensor:
    """Sum over tokens of gBCE (arXiv 2308.07192): `-mean(log sigmoid(s+)^beta, log(1 - sigmoid(s-)))`.

    The mean is over the target and the negatives that are not the target. With the sampling rate
    `alpha = S / (V - 1)` of distinct negatives drawn uniformly from `num_items` = V, and `calibration` t,
    `beta = alpha ((1 - 1/alpha) t + 1/alpha)`: t=0 is plain binary cross-entropy, whose probabilities are too
    high for sampled negatives, t=1 undoes that in full. Differentiable in all float arguments. Raises
    `ValueError` for a calibration outside 0..1.
    """
    if not 0.0 <= calibration <= 1.0:
        raise ValueError(f"calibration={calibration} must lie in 0..1 (0: plain binary cross-entropy)")
    target_logit = (h_Td * target_row_Td).sum(1)
    sample_logit = h_Td @ sample_row_Sd.t()
    if own is not None:
        is_target = own.ids_BN[own.row_T] == target_T[:, None]
        target_logit = target_logit + (own.bonus_TN * is_target).sum(1)
        column_TS, found_TS = _find_own(own, sample_S)
        sample_logit = sample_logit + own.bonus_TN.gather(1, column_TS) * found_TS
    # The published form, multiplied out so that nothing is divided by a small alpha.
    alpha = min(1.0, len(sample_S) / max(1, num_items - 1))
    beta = 1.0 - calibration * (1.0 - alpha)
    keep_TS = sample_S[None, :] != target_T[:, None]
    # log(sigmoid(s)^beta) = beta logsigmoid(s): no probability is formed, so none can round to 0 or 1.
    positive = -beta * F.logsigmoid(target_logit)
    negative = (F.softplus(sample_logit) * keep_TS).sum(1)
    return ((positive + negative) / (keep_TS.sum(1) + 1)).sum()


def _own_logits(h_Td: Tensor, own_row_BNd: Tensor, row_T: Tensor) -> Tensor:
    """`h_t . e_n` for the own items of each token's user: one GEMM a user (tokens are grouped by user)."""
    counts = torch.bincount(row_T, minlength=own_row_BNd.shape[0]).tolist()
    pieces = [h @ rows.t() for h, rows in zip(torch.split(h_Td, counts), own_row_BNd, strict=True)]
    return torch.cat(pieces)


def _find_own(own: OwnBonus, sample_S: Tensor) -> tuple[Tensor, Tensor]:
    """`[T, S]` each: the place of a sample among its token's own items, and whether it is there at all."""
    # Own ids are ascending with zeros (padding) first or last; sort makes the search independent of that.
    sorted_BN, order_BN = own.ids_BN.sort(1)
    num_users, width = sorted_BN.shape
    wanted = sample_S.expand(num_users, -1).contiguous()
    place = torch.searchsorted(sorted_BN, wanted).clamp_(max=width - 1)
    found_BS = sorted_BN.gather(1, place) == wanted
    column_BS = order_BN.gather(1, place)
    return column_BS[own.row_T], found_BS[own.row_T]
