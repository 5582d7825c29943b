"""Computes metrics from exact ranks, as rows that state their protocol.

A case (a user and one target) has the expected rank r = 1 + greater + equal / 2 and
    recall@k = [r <= k],   ndcg@k = [r <= k] / log2(1 + r),   mrr@k = [r <= k] / r,   mrr = 1 / r,
    auc = 1 - (r - 1) / (V - 1),
where V is the number of candidates of the case, including seen items. If a scorer only generates lists of N
items, the rank of a target outside its list is unknown and counts as infinite: metrics at k <= N are exact,
the others are not reported (None). With one target, recall is the hit rate and mrr@k <= ndcg@k <= recall@k.
Averages are over users: a user with several targets (a basket, all events of a period, a tail) has the mean
over its cases. `<metric>_se` is the standard error over users. coverage@k is the share of the catalogue that
is among at least one user's first k items.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from findrec.datasets.batches.evaluation import Part, queries
from findrec.datasets.folder.data_folder import NEVER, DataFolder
from findrec.errors import FindRecError
from findrec.evaluation.protocol import TIE_RULE, RankingProtocol
from findrec.evaluation.scoring.base import UNKNOWN
from findrec.evaluation.scoring.candidates import Candidates, candidate_counts, describe_rule

IntArray = NDArray[np.int64]
FloatArray = NDArray[np.float64]
_HISTORY_BINS = (20, 50, 200, 1000)  # upper bounds of history lengths, in events


def _no_lists() -> IntArray:
    return np.zeros((0, 0), dtype=np.int64)


@dataclass(frozen=True)
class Ranks:
    """Rank counts of all cases, ordered by user, then by the order of the targets in the data."""

    user: IntArray  # [C] rows of the data folder
    target: IntArray  # [C] item ids
    greater: IntArray  # [C] items with a higher score than the target, or `UNKNOWN`
    equal: IntArray  # [C] other items with the same score
    lists: IntArray = field(default_factory=_no_lists)  # [B, 1 + k] user and its first k items, 0-padded
    limit: int | None = None  # ranks are known only up to this one; None: all ranks are known

    @property
    def rank(self) -> FloatArray:
        """Expected rank `[C]` with ties in random order; infinite if unknown."""
        return expected_rank(self.greater, self.equal)

    def to_array(self) -> IntArray:
        """The counts `[C, 4]` without the lists, to send between workers."""
        return np.stack([self.user, self.target, self.greater, self.equal], axis=1)

    @staticmethod
    def from_array(cases: IntArray, lists: IntArray | None = None, limit: int | None = None) -> Ranks:
        """The inverse of `to_array`."""
        user, target, greater, equal = np.ascontiguousarray(cases.T)
        return Ranks(user, target, greater, equal, _no_lists() if lists is None else lists, limit)

    @staticmethod
    def concat(parts: Sequence[Ranks]) -> Ranks:
        """Join the parts of workers or blocks; all cases of a user must be in one part."""
        cases = np.concatenate([part.to_array() for part in parts] or [np.zeros((0, 4), dtype=np.int64)])
        listed = [part.lists for part in parts if len(part.lists)]
        lists = np.concatenate(listed) if listed else _no_lists()
        if len(lists):
            lists = lists[np.argsort(lists[:, 0], kind="stable")]
        limit = next((part.limit for part in parts if part.limit is not None), None)
        return Ranks.from_array(cases[np.argsort(cases[:, 0], kind="stable")], lists, limit)


def expected_rank(greater: IntArray, equal: IntArray) -> FloatArray:
    """Compute `1 + greater + equal / 2` (ties in random order); infinite if `greater` is `UNKNOWN`."""
    expected: FloatArray = np.where(greater == UNKNOWN, np.inf, 1.0 + greater + equal / 2.0)
    return expected


def reported(metric: str, limit: int | None) -> bool:
    """Whether a metric can be computed from ranks that are known up to `limit` (None: all)."""
    _, at, k = metric.partition("@")
    return limit is None or (bool(at) and int(k) <= limit)


def describe_limit(limit: int) -> str:
    """The value of `ranks` in metrics rows whose ranks are known within lists only."""
    return f"lists of {limit} only"


def case_metrics(rank: FloatArray, ks: Sequence[int], num_items: int | IntArray) -> dict[str, FloatArray]:
    """Metrics of single cases, `[C]` each, from expected ranks; `num_items` is V, a number or `[C]`."""
    values: dict[str, FloatArray] = {}
    for k in ks:
        hit = rank <= k
        values[f"ndcg@{k}"] = np.where(hit, 1.0 / np.log2(1.0 + rank), 0.0)
        values[f"recall@{k}"] = hit.astype(np.float64)
        values[f"mrr@{k}"] = np.where(hit, 1.0 / rank, 0.0)
    values["mrr"] = 1.0 / rank
    values["mean_rank"] = rank
    values["auc"] = 1.0 - (rank - 1.0) / np.maximum(1, num_items - 1)
    return values


def user_means(user: IntArray, values: FloatArray) -> FloatArray:
    """Mean `[U]` over the cases of each user, users ascending."""
    _, inverse, count = np.unique(user, return_inverse=True, return_counts=True)
    means: FloatArray = np.bincount(inverse.reshape(-1), weights=values, minlength=len(count)) / count
    return means


def mean_and_error(user: IntArray, values: FloatArray) -> tuple[float, float | None]:
    """Mean over users and its standard error (None for a single user), from values of cases."""
    means = user_means(user, values)
    return float(means.mean()), float(means.std(ddof=1) / np.sqrt(len(means))) if len(means) > 1 else None


def summarise(
    ranks: Ranks, folder: DataFolder, split: Part, protocol: RankingProtocol, *, model: str
) -> dict[str, Any]:
    """Compute the metrics row of a model: the protocol, and every metric with its standard error over users.

    If ranks are known within lists only, `ranks` states it and metrics that are unknown are None. Coverage is
    included for each k that the lists of the ranks reach. Raises `FindRecError` if there are no cases.
    """
    candidates = Candidates.of(folder, protocol.candidates)
    if not len(ranks.user):
        where = (
            "" if candidates.listed_V is None else f" among the items of {describe_rule(protocol.candidates)}"
        )
        raise FindRecError(
            f"no user of {folder.path} has a target in the {split} split{where}: there is nothing to evaluate"
        )
    num_items = int(candidates.at(NEVER, folder.num_items).sum())
    row: dict[str, Any] = {
        "model": model,
        "protocol": protocol.describe(folder),
        "split": split,
        "seen_filter": protocol.mask_seen,
        "candidates": describe_rule(protocol.candidates),
        **({} if (digest := candidates.sha256()) is None else {"candidates_sha256": digest}),
        "tie_rule": TIE_RULE,
        **({} if ranks.limit is None else {"ranks": describe_limit(ranks.limit)}),
        "users": len(np.unique(ranks.user)),
        "cases": len(ranks.user),
        "items": num_items,
    }
    sizes = candidate_counts(folder, split, np.unique(ranks.user), protocol.candidates)
    for name, values in case_metrics(ranks.rank, protocol.ks, sizes).items():
        if not reported(name, ranks.limit):
            row[name] = row[f"{name}_se"] = None
        else:
            row[name], row[f"{name}_se"] = mean_and_error(ranks.user, values)
    for k in protocol.ks:
        if 0 < k < ranks.lists.shape[1] or 0 < folder.num_items < ranks.lists.shape[1]:
            shown = np.unique(ranks.lists[:, 1 : k + 1])
            row[f"coverage@{k}"] = float((shown > 0).sum() / num_items)
    return row


def strata(ranks: Ranks, folder: DataFolder, split: Part, *, model: str, k: int = 10) -> list[dict[str, Any]]:
    """NDCG@k and recall@k of subsets of the cases, as means over cases.

    `<metric>_se` is the standard error with cases clustered by user, None for a single user. Strata by
    target: `warm` items (with training events), of these `head` (the most popular items, with half of the
    training events) and `tail` (the others), and `cold` items (without training events); for each modality
    that some items lack, targets with and without it. Strata by history: the number of events before the
    target (before the user's first target if the ranks leave out some). Empty strata are left out. Returns no
    rows if ranks are not known up to k.
    """
    if not reported(f"ndcg@{k}", ranks.limit):
        return []
    count = folder.train_count
    order = np.argsort(-count, kind="stable")
    before = np.cumsum(count[order]) - count[order]
    head: NDArray[np.bool_] = np.zeros(len(count), dtype=bool)
    head[order] = (before < count.sum() / 2) & (count[order] > 0)
    cold = count[ranks.target] == 0
    parts = {
        "target warm": ~cold,
        "target head": head[ranks.target],
        "target tail": ~head[ranks.target] & ~cold,
        "target cold": cold,
    }
    for modality in folder.modalities:
        present = folder.feature(modality).present
        if not present[1:].all():
            parts[f"target with {modality}"] = present[ranks.target]
            parts[f"target without {modality}"] = ~present[ranks.target]
    made = queries(folder, split, np.unique(ranks.user))
    past = np.repeat(made.first, made.last - made.first)
    if len(past) != len(ranks.user):
        users, begin = np.unique(made.user, return_index=True)
        past = made.first[begin][np.searchsorted(users, ranks.user)]
    for low, high in zip((0, *_HISTORY_BINS), (*_HISTORY_BINS, None), strict=True):
        name = f"history over {low:,}" if high is None else f"history {low + 1:,} to {high:,}"
        parts[name] = (past > low) & (past <= (past.max(initial=0) if high is None else high))
    values = case_metrics(ranks.rank, [k], folder.num_items)
    rows = []
    for part, inside in parts.items():
        if not inside.any():
            continue
        row: dict[str, Any] = {"model": model, "split": split, "part": part, "cases": int(inside.sum())}
        for name in (f"ndcg@{k}", f"recall@{k}"):
            row[name] = float(values[name][inside].mean())
            row[f"{name}_se"] = _clustered_se(ranks.user[inside], values[name][inside])
        rows.append(row)
    return rows


def _clustered_se(user: IntArray, values: FloatArray) -> float | None:
    """Standard error of a mean over cases, clustered by user."""
    _, inverse = np.unique(user, return_inverse=True)
    sums = np.bincount(inverse.reshape(-1), weights=values - values.mean())
    if len(sums) < 2:
        return None
    return float(np.sqrt((sums**2).sum() * len(sums) / (len(sums) - 1)) / len(values))
