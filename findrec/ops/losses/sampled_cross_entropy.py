"""Losses against negatives shared by a microbatch: sampled softmax and gBCE.

`sampled_cross_entropy` estimates the partition function of the full softmax without bias: a token's exact
candidates (its target and, with repeat-consumption terms, the items of its history) enter exactly, all other
items through importance-weighted samples (logQ correction; Bengio & Senecal, IEEE Trans. Neural Networks
19(4), 2008). `generalised_bce` is the loss of gSASRec (Petrov & Macdonald, arXiv 2308.07192).

Both take rows of the item table rather than the table, so that gradients stay as small as the sample. gBCE is
plain autograd over `[T, S]`; the sampled softmax has two implementations:

| impl        | what                                                                                       |
|-------------|--------------------------------------------------------------------------------------------|
| `reference` | all logits under autograd, any dtype; the other is tested against it                       |
| `tiled`     | one tile of tokens at a time in one buffer, gradients computed in the forward pass         |
|             | (`_sampled_tiles`, as in linear_cross_entropy.py); nothing of size T x S is stored         |
| `batched`   | the same for a GPU, which is never waited for: one product with the repeat candidates of   |
|             | all users instead of one for each, and samples compared with all tokens of a tile          |

`auto` is `tiled` on a CPU and `batched` elsewhere.

Shape letters: T tokens, V catalogue size, d width, B users, N distinct items of a user's history, S samples.
"""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor
from torch.nn import functional as F

from findrec.ops._tiles import tile_bytes as tile_bytes_on
from findrec.ops.losses._eager import Gradients, eager_loss
from findrec.ops.losses._sampled_batches import NUM_FLOATS, Inputs, candidates_of_samples
from findrec.ops.losses._sampled_tiles import walk_tiles
from findrec.ops.losses.linear_cross_entropy import RepeatBonus

_TILE_BYTES = 2 << 20  # on a CPU, whose cache a tile should fit


def sampled_cross_entropy(
    h_Td: Tensor,
    target_row_Td: Tensor,
    sample_row_Sd: Tensor,
    target_T: Tensor,
    sample_S: Tensor,
    log_expected_S: Tensor | None = None,
    *,
    repeat: RepeatBonus | None = None,
    candidate_row_BNd: Tensor | None = None,
    impl: Literal["auto", "reference", "tiled", "batched"] = "auto",
    tile_bytes: int | None = None,
) -> Tensor:
    """Sum over tokens of `log Z_t - s_t,target` with an unbiased estimate of the partition function `Z_t`.

    `Z_t = sum over exact candidates of exp(s) + sum over other samples of exp(s - log_expected)`, where
    `log_expected_S = log(S q)` of each sampled item (drawn with replacement from q). Without it there is no
    correction: the loss is a softmax over the samples, which should be distinct. The exact
    candidates are the target and, with `repeat`, the items seen so far; samples that hit one of them are
    dropped, because they are already counted. Tokens of a user are contiguous, users ascend.

    Returns a scalar in the dtype of the inputs; `tiled` and `batched` compute half precision in float32 and
    return that. They are differentiable once, in `h_Td`, the three kinds of rows and `repeat.bonus_TN`, and
    take `tile_bytes` (default: 2 MiB on a CPU, 256 MiB on a GPU) beside the gradients, `batched` also
    several tensors of the size of `repeat.bonus_TN`; `reference` is differentiable also in `log_expected_S`.
    Raises `ValueError` when only one of `repeat` and `candidate_row_BNd` is given, for an unknown `impl`, and
    when `log_expected_S` needs a gradient under another `impl` than `reference`.
    """
    if (repeat is None) != (candidate_row_BNd is None):
        raise ValueError(
            "repeat and candidate_row_BNd (the rows of repeat.ids_BN, scored exactly) must be given together"
        )
    if impl not in ("auto", "reference", "tiled", "batched"):
        raise ValueError(f"impl={impl!r} is unknown: choose one of auto, reference, tiled, batched")
    if impl == "reference":
        return _dense(
            h_Td, target_row_Td, sample_row_Sd, target_T, sample_S, log_expected_S, repeat, candidate_row_BNd
        )
    if log_expected_S is not None and log_expected_S.requires_grad:
        raise ValueError("log_expected_S: only impl='reference' gives it a gradient; detach it")
    bonus, ids, row, seen = (
        (None, None, None, None)
        if repeat is None
        else (repeat.bonus_TN, repeat.ids_BN, repeat.row_T, repeat.seen_TN)
    )
    floats = (h_Td, target_row_Td, sample_row_Sd, candidate_row_BNd, bonus)

    batched = impl == "batched" or (impl == "auto" and h_Td.device.type != "cpu")
    size = tile_bytes_on(h_Td.device, _TILE_BYTES) if tile_bytes is None else tile_bytes
    longest, slot_T = (None, None) if repeat is None else (repeat.longest, repeat.slot_T)

    def walk(tensors: tuple[Tensor | None, ...], needs_grad: tuple[bool, ...]) -> tuple[Tensor, Gradients]:
        given = Inputs(*tensors)  # type: ignore[arg-type]
        return walk_tiles(given, size, needs_grad, batched=batched, longest=longest, slot_T=slot_T)

    others = (target_T, sample_S, log_expected_S, ids, row, seen)
    return eager_loss(walk, NUM_FLOATS, *floats, *others)


def _dense(
    h_Td: Tensor,
    target_row_Td: Tensor,
    sample_row_Sd: Tensor,
    target_T: Tensor,
    sample_S: Tensor,
    log_expected_S: Tensor | None,
    repeat: RepeatBonus | None,
    candidate_row_BNd: Tensor | None,
) -> Tensor:
    target_logit = (h_Td * target_row_Td).sum(1)
    sample_logit = h_Td @ sample_row_Sd.t()
    if log_expected_S is not None:
        sample_logit = sample_logit - log_expected_S
    drop_TS = sample_S[None, :] == target_T[:, None]
    parts = [target_logit[:, None]]
    if repeat is not None and candidate_row_BNd is not None:
        candidate_logit = _candidate_logits(h_Td, candidate_row_BNd, repeat.row_T) + repeat.bonus_TN
        is_target = repeat.ids_BN[repeat.row_T] == target_T[:, None]
        # The bonus of an unseen target is 0, so its entry can be added in any case.
        target_logit = target_logit + (repeat.bonus_TN * is_target).sum(1)
        parts = [target_logit[:, None], candidate_logit.masked_fill(~repeat.seen_TN | is_target, -torch.inf)]
        column_TS, is_candidate_TS = _find_candidates(repeat, sample_S)
        drop_TS = drop_TS | (repeat.seen_TN.gather(1, column_TS) & is_candidate_TS)
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
    repeat: RepeatBonus | None = None,
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
    if repeat is not None:
        is_target = repeat.ids_BN[repeat.row_T] == target_T[:, None]
        target_logit = target_logit + (repeat.bonus_TN * is_target).sum(1)
        column_TS, is_candidate_TS = _find_candidates(repeat, sample_S)
        sample_logit = sample_logit + repeat.bonus_TN.gather(1, column_TS) * is_candidate_TS
    # The published form, multiplied out so that nothing is divided by a small alpha.
    alpha = min(1.0, len(sample_S) / max(1, num_items - 1))
    beta = 1.0 - calibration * (1.0 - alpha)
    keep_TS = sample_S[None, :] != target_T[:, None]
    # log(sigmoid(s)^beta) = beta logsigmoid(s): no probability is computed that could round to 0 or 1.
    positive = -beta * F.logsigmoid(target_logit)
    negative = (F.softplus(sample_logit) * keep_TS).sum(1)
    return ((positive + negative) / (keep_TS.sum(1) + 1)).sum()


def _candidate_logits(h_Td: Tensor, candidate_row_BNd: Tensor, row_T: Tensor) -> Tensor:
    """`h_t . e_n` for the repeat candidates of each token's user: one GEMM per user."""
    counts = torch.bincount(row_T, minlength=candidate_row_BNd.shape[0]).tolist()
    pieces = [h @ rows.t() for h, rows in zip(torch.split(h_Td, counts), candidate_row_BNd, strict=True)]
    return torch.cat(pieces)


def _find_candidates(repeat: RepeatBonus, sample_S: Tensor) -> tuple[Tensor, Tensor]:
    """`[T, S]` each: the index of a sample among its token's candidates, and whether it is one of them."""
    column_BS, is_candidate_BS = candidates_of_samples(repeat.ids_BN, sample_S)
    return column_BS[repeat.row_T], is_candidate_BS[repeat.row_T]
