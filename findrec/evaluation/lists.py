"""What lists of recommendations are like, whatever the targets: concentration, novelty, similarity.

    gini = sum_i (2 i - V - 1) c_(i) / (V sum_i c_i) over all V items, c_(i) the i-th smallest number of lists
           that show an item: 0 when all are shown alike, 1 - 1 / V when every place goes to one item
           (Fleder & Hosanagar, Management Science 55, 2009);
    novelty = mean of -log2(c_i / sum c) over a list, c the training events of its items, at least 1: bits of
           self-information (Zhou et al., PNAS 107, 2010, with events for users);
    ils = intra-list similarity, the mean cosine of the features of all pairs in a list, of items that have
           the modality (Ziegler et al., WWW 2005, as a mean).
The means are over users; a user whose list leaves a figure undefined does not count in it.

Shape letters: U users, K places of a list, V items, F features.
"""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np
import torch
from numpy.typing import NDArray

from findrec.datasets.features import FeatureTable
from findrec.datasets.folder import DataFolder
from findrec.evaluation.metrics import FloatArray, IntArray

_BLOCK_BYTES = 64 << 20


def list_metrics(lists: IntArray, folder: DataFolder, ks: Iterable[int]) -> dict[str, float | None]:
    """`gini@k`, `novelty@k` and for each modality `ils_<modality>@k`.

    `lists` are `Ranks.lists`: `[U, 1 + K]`, the user and then its first items, 0 where there are no more. A k
    they do not reach is left out, unless they hold the whole catalogue; None stands for a mean of no user.
    Raises `ValueError` for items the folder does not have.
    """
    row: dict[str, float | None] = {}
    held = lists.shape[1] - 1
    for k in ks:
        if not 0 < min(k, folder.num_items) <= held:
            continue
        items_UK = lists[:, 1 : k + 1]
        row[f"gini@{k}"] = gini(items_UK, folder.num_items)
        row[f"novelty@{k}"] = _mean(novelty(items_UK, folder.train_count))
        for modality in folder.modalities:
            row[f"ils_{modality}@{k}"] = _mean(intra_list_similarity(items_UK, folder.feature(modality)))
    return row


def gini(items_UK: IntArray, num_items: int) -> float | None:
    """The Gini coefficient of how often each of the `num_items` items is shown; None when none is."""
    shown = np.sort(_count(items_UK, num_items))
    if not shown.sum():
        return None
    weight = 2 * np.arange(1, num_items + 1) - num_items - 1
    return float((weight * shown.astype(np.float64)).sum() / (num_items * float(shown.sum())))


def novelty(items_UK: IntArray, train_count: IntArray) -> FloatArray:
    """`[U]` mean self-information of each list in bits, NaN for an empty one; `train_count` is `[V + 1]`."""
    _count(items_UK, len(train_count) - 1)
    bits = np.log2(max(1, int(train_count.sum()))) - np.log2(np.maximum(train_count, 1))
    bits[0] = 0.0
    return _divide(bits[items_UK].sum(axis=1), (items_UK > 0).sum(axis=1))


def intra_list_similarity(items_UK: IntArray, feature: FeatureTable) -> FloatArray:
    """`[U]` mean cosine of the pairs of each list, NaN where fewer than two items have such features.

    With unit vectors e of n items the pairs sum up to (|sum e|^2 - n) / 2, so no pair is formed.
    """
    _count(items_UK, len(feature) - 1)
    similar = np.full(len(items_UK), np.nan)
    step = max(1, _BLOCK_BYTES // (16 * feature.dim * max(1, items_UK.shape[1])))
    for lo in range(0, len(items_UK), step):
        distinct, place_bK = np.unique(items_UK[lo : lo + step], return_inverse=True)
        unit_IF = _units(distinct, feature)
        place_bK = place_bK.reshape(-1, items_UK.shape[1])
        sum_bF = unit_IF[place_bK].sum(axis=1)
        count = (unit_IF != 0).any(axis=1)[place_bK].sum(axis=1)
        similar[lo : lo + step] = _divide((sum_bF**2).sum(axis=1) - count, count * (count - 1))
    return similar


def _units(items: IntArray, feature: FeatureTable) -> FloatArray:
    """Features of length 1; 0, as they are stored, for padding and for items without any."""
    values = feature.rows(torch.from_numpy(items)).values.numpy().astype(np.float64)
    length = np.sqrt((values**2).sum(axis=1, keepdims=True))
    unit: FloatArray = values / np.where(length > 0, length, 1.0)
    return unit


def _count(items_UK: IntArray, num_items: int) -> NDArray[np.int64]:
    """`[V]` in how many places each item is."""
    if items_UK.size and not 0 <= items_UK.min() <= items_UK.max() <= num_items:
        raise ValueError(f"lists hold items {items_UK.min()}..{items_UK.max()}, there are 1..{num_items}")
    return np.bincount(items_UK.reshape(-1), minlength=num_items + 1)[1:]


def _divide(total: FloatArray, count: IntArray) -> FloatArray:
    found: FloatArray = np.divide(total, count, out=np.full(len(total), np.nan), where=count > 0)
    return found


def _mean(values: FloatArray) -> float | None:
    known = values[~np.isnan(values)]
    return float(known.mean()) if len(known) else None
