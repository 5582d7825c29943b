"""Metrics of recommendation lists that do not depend on targets: concentration, novelty, similarity.

    gini = sum_i (2 i - V - 1) c_(i) / (V sum_i c_i) over all V items, c_(i) the i-th smallest number of lists
           that contain an item: 0 if all items are listed equally often, 1 - 1 / V if only one item is listed
           (Fleder & Hosanagar, Management Science 55, 2009);
    novelty = mean of -log2(c_i / sum c) over a list, c the training events of its items, at least 1: bits of
           self-information (Zhou et al., PNAS 107, 2010, with events instead of users);
    ils = intra-list similarity, the mean cosine of the features of all pairs in a list, of items that have
           the modality (Ziegler et al., WWW 2005, as a mean).
Means are over the users for whom the metric is defined.

Shape letters: U users, K length of a list, V items, F features.
"""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np
import torch
from numpy.typing import NDArray

from findrec.datasets.folder.data_folder import DataFolder
from findrec.datasets.folder.features import FeatureTable
from findrec.evaluation.metrics.metrics import FloatArray, IntArray

_BLOCK_BYTES = 64 << 20


def list_metrics(lists: IntArray, folder: DataFolder, ks: Iterable[int]) -> dict[str, float | None]:
    """Compute `gini@k`, `novelty@k` and, for each modality, `ils_<modality>@k`.

    `lists` are `Ranks.lists`, `[U, 1 + K]`: the user, then the listed items, 0-padded. A k above K is left
    out unless the lists contain the whole catalogue. A metric is None if it is undefined for all users.
    Raises `ValueError` for item ids that are not in the folder.
    """
    row: dict[str, float | None] = {}
    length = lists.shape[1] - 1
    for k in ks:
        if not 0 < min(k, folder.num_items) <= length:
            continue
        items_UK = lists[:, 1 : k + 1]
        row[f"gini@{k}"] = gini(items_UK, folder.num_items)
        row[f"novelty@{k}"] = _mean(novelty(items_UK, folder.train_count))
        for modality in folder.modalities:
            row[f"ils_{modality}@{k}"] = _mean(intra_list_similarity(items_UK, folder.feature(modality)))
    return row


def gini(items_UK: IntArray, num_items: int) -> float | None:
    """Gini coefficient of how often each of the `num_items` items is listed; None for empty lists."""
    shown = np.sort(_count(items_UK, num_items))
    if not shown.sum():
        return None
    weight = 2 * np.arange(1, num_items + 1) - num_items - 1
    return float((weight * shown.astype(np.float64)).sum() / (num_items * float(shown.sum())))


def novelty(items_UK: IntArray, train_count: IntArray) -> FloatArray:
    """Mean self-information `[U]` of each list in bits, NaN if empty; `train_count` is `[V + 1]`."""
    _count(items_UK, len(train_count) - 1)
    bits = np.log2(max(1, int(train_count.sum()))) - np.log2(np.maximum(train_count, 1))
    bits[0] = 0.0
    return _divide(bits[items_UK].sum(axis=1), (items_UK > 0).sum(axis=1))


def intra_list_similarity(items_UK: IntArray, feature: FeatureTable) -> FloatArray:
    """Mean cosine `[U]` of the pairs of each list, NaN if fewer than two items have the feature.

    For unit vectors e of n items, the cosines of all pairs sum to (|sum e|^2 - n) / 2.
    """
    _count(items_UK, len(feature) - 1)
    similar = np.full(len(items_UK), np.nan)
    step = max(1, _BLOCK_BYTES // (16 * feature.dim * max(1, items_UK.shape[1])))
    for lo in range(0, len(items_UK), step):
        distinct, index_bK = np.unique(items_UK[lo : lo + step], return_inverse=True)
        unit_IF = _unit_features(distinct, feature)
        index_bK = index_bK.reshape(-1, items_UK.shape[1])
        sum_bF = unit_IF[index_bK].sum(axis=1)
        count = (unit_IF != 0).any(axis=1)[index_bK].sum(axis=1)
        similar[lo : lo + step] = _divide((sum_bF**2).sum(axis=1) - count, count * (count - 1))
    return similar


def _unit_features(items: IntArray, feature: FeatureTable) -> FloatArray:
    """Features scaled to length 1; zeros for padding and for items without the feature."""
    values = feature.rows(torch.from_numpy(items)).values.numpy().astype(np.float64)
    length = np.sqrt((values**2).sum(axis=1, keepdims=True))
    unit: FloatArray = values / np.where(length > 0, length, 1.0)
    return unit


def _count(items_UK: IntArray, num_items: int) -> NDArray[np.int64]:
    """Number of occurrences `[V]` of each item."""
    if items_UK.size and not 0 <= items_UK.min() <= items_UK.max() <= num_items:
        raise ValueError(
            f"lists contain item ids {items_UK.min()}..{items_UK.max()}, valid ids are 1..{num_items}"
        )
    return np.bincount(items_UK.reshape(-1), minlength=num_items + 1)[1:]


def _divide(total: FloatArray, count: IntArray) -> FloatArray:
    ratio: FloatArray = np.divide(total, count, out=np.full(len(total), np.nan), where=count > 0)
    return ratio


def _mean(values: FloatArray) -> float | None:
    known = values[~np.isnan(values)]
    return float(known.mean()) if len(known) else None
