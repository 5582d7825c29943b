"""What a ranking among a few sampled items would have said, for those who must look at older tables.

Ranking the target among N items drawn from the catalogue instead of all of it is not consistent: it orders
models differently and depends on N (Krichene & Rendle, KDD 2020). These figures are an extra, never compared
with full ones. Nothing is drawn: of the P other candidates g score above the target and e the same, so that
N drawn without replacement hold j above with the hypergeometric probability H(j; P, g, N), and t of the ties
among the other N - j with H(t; P - g, e, N - j). The expectation over j and t of a metric at the rank
1 + j + t / 2 is what infinitely many draws average to.

Shape letters: C cases, D distinct cases, J drawn.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from findrec.datasets.batches import Part, evaluation_blocks
from findrec.datasets.folder import DataFolder
from findrec.evaluation.candidates import Candidates, Rule, candidate_counts
from findrec.evaluation.metrics import (
    FloatArray,
    IntArray,
    Ranks,
    case_metrics,
    describe_protocol,
    user_means,
)
from findrec.evaluation.scorers import UserBlock

_BLOCK_BYTES = 64 << 20


def sampled_row(
    ranks: Ranks,
    folder: DataFolder,
    split: Part,
    pool_C: IntArray,
    count: int,
    *,
    ks: Sequence[int],
    model: str,
    mask_seen: bool = False,
    candidates: Rule = "all",
) -> dict[str, Any]:
    """The row of a model among `count` sampled candidates, averaged over users as `summarise` does."""
    row: dict[str, Any] = {
        "model": model,
        "protocol": f"sampled {count} (not comparable)",
        "sampled_from": describe_protocol(folder, mask_seen, candidates),
        "split": split,
        "users": len(np.unique(ranks.user)),
        "cases": len(ranks.user),
    }
    for name, values in sampled_metrics(ranks.greater, ranks.equal, pool_C, count, ks).items():
        means = user_means(ranks.user, values)
        row[name] = float(means.mean())
        row[f"{name}_se"] = float(means.std(ddof=1) / np.sqrt(len(means))) if len(means) > 1 else None
    return row


def sampled_metrics(
    greater_C: IntArray, equal_C: IntArray, pool_C: IntArray, count: int, ks: Sequence[int]
) -> dict[str, FloatArray]:
    """Expected ndcg, recall and mrr at each k, and mrr, `[C]`, among `count` of the `pool_C` other candidates
    (all of them where there are fewer). Raises `ValueError` for counts that do not fit the pool.
    """
    if count < 1 or (greater_C < 0).any() or (equal_C < 0).any() or (greater_C + equal_C > pool_C).any():
        raise ValueError("sampled metrics need 1 or more draws and counts that fit the pool of the draws")
    cases, place_C = np.unique(np.stack([greater_C, equal_C, pool_C], axis=1), axis=0, return_inverse=True)
    place_C = place_C.reshape(-1)
    parts = []
    step = max(1, _BLOCK_BYTES // (64 * (count + 1)))
    for lo in range(0, len(cases), step):
        greater_D, equal_D, pool_D = cases[lo : lo + step].T
        parts.append(_expected(greater_D, equal_D, pool_D, count, ks))
    names = parts[0] if parts else {}
    return {name: np.concatenate([part[name] for part in parts])[place_C] for name in names}


def _expected(
    greater_D: IntArray, equal_D: IntArray, pool_D: IntArray, count: int, ks: Sequence[int]
) -> dict[str, FloatArray]:
    draws_D = np.minimum(count, pool_D)
    above_DJ = _hypergeometric(pool_D, greater_D, draws_D, count + 1)
    at = _metrics(1.0 + np.arange(2 * count + 1) / 2, ks)  # by twice the rank less one
    found = {name: above_DJ @ values[::2] for name, values in at.items()}
    tied = np.flatnonzero(equal_D)
    if len(tied):
        for name in found:
            found[name][tied] = 0.0
        for j in range(count + 1):
            rest_T = draws_D[tied] - j
            open_T = rest_T >= 0
            some = tied[open_T]
            ties_TJ = _hypergeometric(
                pool_D[some] - greater_D[some], equal_D[some], rest_T[open_T], count + 1 - j
            )
            weight_T = above_DJ[some, j]
            for name, values in at.items():
                found[name][some] += weight_T * (ties_TJ @ values[2 * j : count + j + 1])
    return found


def _metrics(rank: FloatArray, ks: Sequence[int]) -> dict[str, FloatArray]:
    every = case_metrics(rank, ks, 2)
    return {name: values for name, values in every.items() if name not in ("mean_rank", "auc")}


def _hypergeometric(pool_D: IntArray, good_D: IntArray, draws_D: IntArray, size: int) -> FloatArray:
    """`[D, size]` the probability of 0, 1, ... good ones among `draws` out of `pool`, `good` of them good.

    Neighbouring probabilities have a simple ratio; where the product would not fit a float, its logarithm
    does. A case that cannot be (more drawn than there are) gives zeros.
    """
    j_J = np.arange(size)[None, :]
    pool, good, draws = pool_D[:, None], good_D[:, None], draws_D[:, None]
    possible = (j_J <= good) & (j_J <= draws) & (draws - j_J <= pool - good)
    ratio = np.ones((len(pool_D), size))
    above = np.maximum((good - j_J[:, 1:] + 1) * (draws - j_J[:, 1:] + 1), 0)
    below = j_J[:, 1:] * (pool - good - draws + j_J[:, 1:])
    fits = possible[:, 1:] & possible[:, :-1]
    ratio[:, 1:] = np.where(fits, above / np.where(fits, below, 1), 1.0)
    log = np.where(possible, np.cumsum(np.log(ratio), axis=1), -np.inf)
    top = log.max(axis=1, keepdims=True)
    weight = np.exp(log - np.where(np.isfinite(top), top, 0.0))
    total = weight.sum(axis=1, keepdims=True)
    shares: FloatArray = weight / np.where(total > 0, total, 1.0)
    return shares


def pool_sizes(
    folder: DataFolder, split: Part, *, users_per_block: int, mask_seen: bool, candidates: Rule
) -> IntArray:
    """`[C]` how many items compete with each target of a split, in the order of `Ranks`."""
    offer = Candidates.of(folder, candidates)
    since_V = offer.since_V
    users, removed = [np.zeros(0, dtype=np.int64)], [np.zeros(0, dtype=np.int64)]
    for some in evaluation_blocks(folder, split, users_per_block):
        block = UserBlock.read(folder, split, some, 1)
        cases = offer.asked(block.cases)
        gone_C = np.zeros(len(cases.target), dtype=np.int64)
        if mask_seen:
            seen_CN = block.padded_items()[cases.row]
            counts_CN = (seen_CN > 0) & (seen_CN != cases.target[:, None])
            if since_V is not None:
                counts_CN &= since_V[seen_CN] <= cases.time[:, None]
            gone_C = counts_CN.sum(1).numpy()
        users.append(cases.user.numpy())
        removed.append(gone_C)
    user_C = np.concatenate(users)
    order = np.argsort(user_C, kind="stable")
    offered = candidate_counts(folder, split, np.unique(user_C), candidates)
    pool: IntArray = offered - 1 - np.concatenate(removed)[order]
    return pool
