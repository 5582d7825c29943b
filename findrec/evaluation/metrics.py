"""From exact ranks to a metrics row that states its protocol.

A case (a user and one target) has the expected rank r = 1 + greater + equal / 2 and
    recall@k = [r <= k],   ndcg@k = [r <= k] / log2(1 + r),   mrr@k = [r <= k] / r,   mrr = 1 / r,
    auc = 1 - (r - 1) / (V - 1),
where V counts the case's candidates (seen items too).
With one target recall is the hit rate, and mrr@k <= ndcg@k <= recall@k. A user with several targets (a
basket, all events of a period, a tail) counts once, with the mean over the cases: averages are over users.
`<metric>_se` is the standard error over users. coverage@k is the share of the catalogue in at least one
user's first k.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from datetime import datetime, timezone
from typing import Any

import numpy as np
from numpy.typing import NDArray

from findrec.datasets.batches import Part, moments
from findrec.datasets.folder import NEVER, DataFolder
from findrec.errors import FindRecError
from findrec.evaluation.candidates import (
    Candidates,
    Rule,
    candidate_counts,
    conditions_of,
    describe_rule,
    goes_by_time,
)

IntArray = NDArray[np.int64]
FloatArray = NDArray[np.float64]
_HISTORIES = (20, 50, 200, 1000)  # events: where one part of the histories ends and the next begins
TIE_RULE = "expected rank"
REPEATS_NOTHING = 0.01  # a repeat rate below it: nobody comes back to an item


def _no_lists() -> IntArray:
    return np.zeros((0, 0), dtype=np.int64)


@dataclass(frozen=True)
class Ranks:
    """Counts of all cases, ordered by user, a user's targets in their order in the data."""

    user: IntArray  # [C] rows of the data folder
    target: IntArray  # [C] item ids
    greater: IntArray  # [C] items that score above the target
    equal: IntArray  # [C] other items that score the same
    lists: IntArray = field(default_factory=_no_lists)  # [B, 1 + k] user, its first k items (0: no more)

    @property
    def rank(self) -> FloatArray:
        """`[C]` expected rank: ties are placed at random."""
        expected: FloatArray = 1.0 + self.greater + self.equal / 2.0
        return expected

    def to_array(self) -> IntArray:
        """`[C, 4]` the counts without the lists, to be sent between workers."""
        return np.stack([self.user, self.target, self.greater, self.equal], axis=1)

    @staticmethod
    def from_array(cases: IntArray, lists: IntArray | None = None) -> Ranks:
        """Back from `to_array` (and `lists`)."""
        user, target, greater, equal = np.ascontiguousarray(cases.T)
        return Ranks(user, target, greater, equal, _no_lists() if lists is None else lists)

    @staticmethod
    def concat(parts: Sequence[Ranks]) -> Ranks:
        """Join the parts of workers or blocks; each user's cases must all lie in one part."""
        cases = np.concatenate([part.to_array() for part in parts] or [np.zeros((0, 4), dtype=np.int64)])
        listed = [part.lists for part in parts if len(part.lists)]
        lists = np.concatenate(listed) if listed else _no_lists()
        if len(lists):
            lists = lists[np.argsort(lists[:, 0], kind="stable")]
        return Ranks.from_array(cases[np.argsort(cases[:, 0], kind="stable")], lists)


def split_title(folder: DataFolder) -> str:
    """The name of the folder's split as protocols call it (evaluation/protocols/<name>.md)."""
    split = folder.manifest.split
    kind = str(split.get("kind", "leave_one_out"))
    if kind == "leave_one_out" and split.get("unit") == "timestamp":
        return "leave-one-basket-out"
    return kind.replace("_", "-")


def _split_details(folder: DataFolder) -> str:
    """What the split's name leaves open: its cuts, and which history ranks which targets."""
    split = folder.manifest.split
    if "valid_from" in split:
        cuts = f"validation from {_moment(split['valid_from'])}, test from {_moment(split['test_from'])}"
    elif "last" in split:
        units = "baskets" if split.get("unit") == "timestamp" else "events"
        one = units.removesuffix("s")
        return (
            f" (the last {split['last'][1]} {units} of each user, the {split['last'][0]} before them for "
            f"validation; each {one} ranked from all events before it)"
        )
    elif "ratio" in split:
        units = "baskets" if split.get("unit") == "timestamp" else "events"
        cuts = f"{':'.join(str(part) for part in split['ratio'])} of each user's {units}"
    else:
        return ""
    return f" ({cuts}; all events of a part ranked from the history before its first)"


def _moment(seconds: int) -> str:
    try:
        return datetime.fromtimestamp(seconds, timezone.utc).strftime("%Y-%m-%dT%H:%M:%SZ")
    except (OverflowError, OSError, ValueError):
        return str(seconds)  # not every log counts from 1970


def seen_filter(configured: bool | None, folder: DataFolder) -> bool:
    """Whether the items of a user's history leave the ranking: as configured, else as the data say.

    Where fewer than one training event in a hundred has an item that its user had before, an item met is no
    answer; where more have, leaving those out would leave out what is asked for.
    """
    return folder.manifest.repeat_rate < REPEATS_NOTHING if configured is None else configured


def describe_protocol(folder: DataFolder, mask_seen: bool, candidates: Rule = "all") -> str:
    """One line that says how a row was measured."""
    seen = "removed" if mask_seen else "kept"
    gone = int(folder.gone.sum())
    size = f"{folder.num_items - gone:,} items"
    if gone:
        size += f"; {gone:,} gone ones left out"
    among = f"full catalogue ({size})"
    if conditions := conditions_of(candidates):
        listed = int(Candidates.of(folder, conditions).at(NEVER, folder.num_items).sum())
        among = (
            f"the {listed:,} items of {' and '.join(conditions)} (other targets left out), out of the {among}"
        )
    if goes_by_time(candidates):
        among = f"the items available at the target's time, out of the {among}"
    return f"{split_title(folder)}{_split_details(folder)}, {among}, seen items {seen}, ties at {TIE_RULE}"


def case_metrics(rank: FloatArray, ks: Sequence[int], num_items: int | IntArray) -> dict[str, FloatArray]:
    """Every metric of every case, `[C]` each, from expected ranks; `num_items` is V, one for all or `[C]`."""
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
    """`[U]` mean over each user's cases, users ascending."""
    _, inverse, count = np.unique(user, return_inverse=True, return_counts=True)
    means: FloatArray = np.bincount(inverse.reshape(-1), weights=values, minlength=len(count)) / count
    return means


def summarise(
    ranks: Ranks,
    folder: DataFolder,
    split: Part,
    *,
    ks: Sequence[int],
    model: str,
    mask_seen: bool = False,
    candidates: Rule = "all",
) -> dict[str, Any]:
    """The metrics row of a model: its protocol, then every metric with the standard error over users.

    A standard error needs two users (else None). Coverage is there for each k the ranks hold lists for.
    Raises `FindRecError` without cases.
    """
    offer = Candidates.of(folder, candidates)
    if not len(ranks.user):
        where = "" if offer.listed_V is None else f" among the items of {describe_rule(candidates)}"
        raise FindRecError(
            f"no user of {folder.path} has a target in the {split} split{where}: there is nothing to measure"
        )
    num_items = int(offer.at(NEVER, folder.num_items).sum())
    row: dict[str, Any] = {
        "model": model,
        "protocol": describe_protocol(folder, mask_seen, candidates),
        "split": split,
        "seen_filter": mask_seen,
        "candidates": describe_rule(candidates),
        **({} if (digest := offer.sha256()) is None else {"candidates_sha256": digest}),
        "tie_rule": TIE_RULE,
        "users": len(np.unique(ranks.user)),
        "cases": len(ranks.user),
        "items": num_items,
    }
    sizes = candidate_counts(folder, split, np.unique(ranks.user), candidates)
    for name, values in case_metrics(ranks.rank, ks, sizes).items():
        means = user_means(ranks.user, values)
        row[name] = float(means.mean())
        row[f"{name}_se"] = float(means.std(ddof=1) / np.sqrt(len(means))) if len(means) > 1 else None
    for k in ks:
        if 0 < k < ranks.lists.shape[1] or 0 < folder.num_items < ranks.lists.shape[1]:
            shown = np.unique(ranks.lists[:, 1 : k + 1])
            row[f"coverage@{k}"] = float((shown > 0).sum() / num_items)
    return row


def strata(ranks: Ranks, folder: DataFolder, split: Part, *, model: str, k: int = 10) -> list[dict[str, Any]]:
    """NDCG@k and recall@k of parts of the cases, averaged over cases, with the standard error of a mean over
    cases that come in users (`<metric>_se`, None for a single user).

    By target: `warm` items (with a training event), of these `head` (the most popular ones that together hold
    half of the training events) and `tail` (the rest), and `cold` items (without one); for a modality that
    some item lacks, targets with and without it. By history: events before the target (the user's
    first, where the ranks leave some targets out). Empty parts are left out.
    """
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
    asked = moments(folder, split, np.unique(ranks.user))
    past = np.repeat(asked.first, asked.last - asked.first)
    if len(past) != len(ranks.user):
        users, begin = np.unique(asked.user, return_index=True)
        past = asked.first[begin][np.searchsorted(users, ranks.user)]
    for low, high in zip((0, *_HISTORIES), (*_HISTORIES, None), strict=True):
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
    """The standard error of a mean over cases: what a user's cases have in common counts once."""
    _, inverse = np.unique(user, return_inverse=True)
    sums = np.bincount(inverse.reshape(-1), weights=values - values.mean())
    if len(sums) < 2:
        return None
    return float(np.sqrt((sums**2).sum() * len(sums) / (len(sums) - 1)) / len(values))
