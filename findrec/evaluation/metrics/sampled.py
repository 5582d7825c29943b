"""Expected metrics among a few sampled candidates, for comparison with older publications.

Ranking a target among N sampled items is inconsistent with the full ranking: it may order models differently
and depends on N (Krichene & Rendle, KDD 2020). Sampled metrics are an extra and not comparable with full
ones. They are computed exactly, without sampling: of P other candidates, g score above the target and e equal
to it. N candidates drawn without replacement contain j of the former with the hypergeometric probability
H(j; P, g, N), and t of the latter among the remaining N - j with H(t; P - g, e, N - j). The result is the
expectation over j and t of the metric at rank 1 + j + t / 2.

Shape letters: C cases, D distinct cases, J drawn.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from findrec.datasets.batches.evaluation import Part, evaluation_blocks
from findrec.datasets.folder.data_folder import DataFolder
from findrec.evaluation.metrics.metrics import FloatArray, IntArray, Ranks, case_metrics, mean_and_error
from findrec.evaluation.protocol import RankingProtocol
from findrec.evaluation.scoring.candidates import Candidates, candidate_counts
from findrec.evaluation.scoring.users import UserBlock

_BLOCK_BYTES = 64 << 20


def sampled_row(
    ranks: Ranks,
    folder: DataFolder,
    split: Part,
    protocol: RankingProtocol,
    pool_C: IntArray,
    *,
    model: str,
) -> dict[str, Any]:
    """The metrics row of a model among `protocol.sampled` candidates; `pool_C` as in `pool_sizes`."""
    count = protocol.sampled
    assert count is not None, "the protocol samples no candidates"
    row: dict[str, Any] = {
        "model": model,
        "protocol": f"sampled {count} (not comparable)",
        "sampled_from": protocol.describe(folder),
        "split": split,
        "users": len(np.unique(ranks.user)),
        "cases": len(ranks.user),
    }
    for name, values in sampled_metrics(ranks.greater, ranks.equal, pool_C, count, protocol.ks).items():
        row[name], row[f"{name}_se"] = mean_and_error(ranks.user, values)
    return row


def sampled_metrics(
    greater_C: IntArray, equal_C: IntArray, pool_C: IntArray, count: int, ks: Sequence[int]
) -> dict[str, FloatArray]:
    """Expected ndcg, recall and mrr at each k, and mrr, `[C]` each.

    Ranks are among `count` of the `pool_C` other candidates, or all of them if there are fewer. Raises
    `ValueError` for counts that exceed the pool.
    """
    if count < 1 or (greater_C < 0).any() or (equal_C < 0).any() or (greater_C + equal_C > pool_C).any():
        raise ValueError("sampled metrics need a count of at least 1 and rank counts within the pool size")
    cases, index_C = np.unique(np.stack([greater_C, equal_C, pool_C], axis=1), axis=0, return_inverse=True)
    index_C = index_C.reshape(-1)
    parts = []
    step = max(1, _BLOCK_BYTES // (64 * (count + 1)))
    for lo in range(0, len(cases), step):
        greater_D, equal_D, pool_D = cases[lo : lo + step].T
        parts.append(_expected(greater_D, equal_D, pool_D, count, ks))
    names = parts[0] if parts else {}
    return {name: np.concatenate([part[name] for part in parts])[index_C] for name in names}


def _expected(
    greater_D: IntArray, equal_D: IntArray, pool_D: IntArray, count: int, ks: Sequence[int]
) -> dict[str, FloatArray]:
    draws_D = np.minimum(count, pool_D)
    above_DJ = _hypergeometric(pool_D, greater_D, draws_D, count + 1)
    at = _metrics(1.0 + np.arange(2 * count + 1) / 2, ks)  # indexed by 2 (rank - 1)
    expected = {name: above_DJ @ values[::2] for name, values in at.items()}
    tied = np.flatnonzero(equal_D)
    if len(tied):
        for name in expected:
            expected[name][tied] = 0.0
        for j in range(count + 1):
            rest_T = draws_D[tied] - j
            open_T = rest_T >= 0
            some = tied[open_T]
            ties_TJ = _hypergeometric(
                pool_D[some] - greater_D[some], equal_D[some], rest_T[open_T], count + 1 - j
            )
            weight_T = above_DJ[some, j]
            for name, values in at.items():
                expected[name][some] += weight_T * (ties_TJ @ values[2 * j : count + j + 1])
    return expected


def _metrics(rank: FloatArray, ks: Sequence[int]) -> dict[str, FloatArray]:
    metrics = case_metrics(rank, ks, 2)
    return {name: values for name, values in metrics.items() if name not in ("mean_rank", "auc")}


def _hypergeometric(pool_D: IntArray, good_D: IntArray, draws_D: IntArray, size: int) -> FloatArray:
    """Hypergeometric probabilities `[D, size]` of 0, 1, ... good ones among `draws` out of `pool`.

    Computed from the ratios of neighbouring probabilities, in logarithms to avoid overflow. Impossible cases
    (more draws than the pool has) give zeros.
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


def pool_sizes(folder: DataFolder, split: Part, protocol: RankingProtocol) -> IntArray:
    """Number `[C]` of items that compete with each target of a split, in the order of `Ranks`."""
    candidates = Candidates.of(folder, protocol.candidates)
    since_V = candidates.since_V
    users, removed = [np.zeros(0, dtype=np.int64)], [np.zeros(0, dtype=np.int64)]
    for some in evaluation_blocks(folder, split, protocol.users_per_block):
        block = UserBlock.read(folder, split, some, 1)
        cases = candidates.with_listed_targets(block.cases)
        removed_C = np.zeros(len(cases.target), dtype=np.int64)
        if protocol.mask_seen:
            seen_CN = block.padded_items()[cases.row]
            removed_CN = (seen_CN > 0) & (seen_CN != cases.target[:, None])
            if since_V is not None:
                removed_CN &= since_V[seen_CN] <= cases.time[:, None]
            removed_C = removed_CN.sum(1).numpy()
        users.append(cases.user.numpy())
        removed.append(removed_C)
    user_C = np.concatenate(users)
    order = np.argsort(user_C, kind="stable")
    counts = candidate_counts(folder, split, np.unique(user_C), protocol.candidates)
    pool: IntArray = counts - 1 - np.concatenate(removed)[order]
    return pool
