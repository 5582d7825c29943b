"""Generate a synthetic catalogue: popularity, lifetime, category and features of each item.

All arrays are drawn once from the seed. Items are sorted by category, then by popularity, so that one binary
search in the running sum of their weights draws an item of a given category.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray

from findrec.datasets.folder.features import FeatureInput
from findrec.datasets.synthetic.profile import Modality, Popularity, Profile

ITEM_STREAM, EVENT_STREAM, FEATURE_STREAM, PILOT_STREAM = 1, 2, 3, 4  # keys of the random streams
ITEMS_PER_CATEGORY = 20  # minimum on average; small catalogues have fewer categories
ROWS_AT_ONCE = 1 << 16

Float64Array = NDArray[np.float64]


def popularity_weights(popularity: Popularity, num_items: int) -> Float64Array:
    """`[V]` weight by rank: `r^-head`, then `r^-tail`, continuous at the break."""
    rank = np.arange(1, num_items + 1, dtype=np.float64)
    edge = max(1.0, popularity.break_share * num_items)
    tail = edge ** (popularity.tail - popularity.head) * rank**-popularity.tail
    return np.where(rank <= edge, rank**-popularity.head, tail)


@dataclass(frozen=True)
class Catalogue:
    """Items sorted by category, then popularity; arrays are `[V]` unless stated otherwise."""

    item: NDArray[np.int32]  # 1-based id
    born: NDArray[np.float32]  # when it appears, in shares of the time span
    peak: NDArray[np.float32]  # when it is at its most popular: [peak, past)
    past: NDArray[np.float32]
    total: Float64Array  # running sum of the weights
    edge: Float64Array  # [C+1] running sum at the categories' edges
    category: NDArray[np.int32]  # [V] category of each id: `category[v - 1]`

    def draw(self, low: Float64Array, high: Float64Array, uniform: Float64Array) -> NDArray[np.int64]:
        """Draw item indices by weight between two running sums; `uniform` lies in [0, 1)."""
        index = np.searchsorted(self.total, low + uniform * (high - low), side="right")
        return np.minimum(index, len(self.total) - 1)


def make_catalogue(profile: Profile, num_items: int, seed: int) -> Catalogue:
    """Draw the catalogue of `num_items` items."""
    rng = np.random.default_rng([seed, ITEM_STREAM])
    num_categories = max(1, min(profile.taste.categories, num_items // ITEMS_PER_CATEGORY))
    share = np.arange(1, num_categories + 1, dtype=np.float64) ** -profile.taste.skew
    of_rank = np.searchsorted(np.cumsum(share / share.sum())[:-1], rng.random(num_items), side="right")
    order = np.argsort(of_rank, kind="stable")
    total = np.cumsum(popularity_weights(profile.popularity, num_items)[order])
    ends = np.searchsorted(of_rank[order], np.arange(num_categories), side="right")
    item = (rng.permutation(num_items) + 1).astype(np.int32)[order]
    drift = profile.drift
    new = rng.random(num_items) < drift.new
    born = np.where(new, rng.random(num_items), -np.inf)
    peak = np.where(new, born, rng.uniform(-drift.life, 1.0, num_items))
    past = np.where(rng.random(num_items) < drift.lasting, np.inf, peak + drift.life)
    peak = np.where(np.isinf(past), born, peak)
    category = np.empty(num_items, dtype=np.int32)
    category[item - 1] = of_rank[order]
    return Catalogue(
        item=item,
        born=born.astype(np.float32),
        peak=peak.astype(np.float32),
        past=past.astype(np.float32),
        total=total,
        edge=np.concatenate([[0.0], np.concatenate([[0.0], total])[ends]]),
        category=category,
    )


def items_table(catalogue: Catalogue) -> pa.Table:
    """V rows: raw, title, text, category."""
    raw = pa.array(np.arange(1, len(catalogue.item) + 1)).cast(pa.string())
    category = pc.binary_join_element_wise(
        "category", pa.array(catalogue.category + 1).cast(pa.string()), " "
    )
    title = pc.binary_join_element_wise("item", raw, " ")
    text = pc.binary_join_element_wise(title, category, ", ")
    return pa.table({"raw": raw, "title": title, "text": text, "category": category})


def make_feature(catalogue: Catalogue, name: str, modality: Modality, seed: int) -> FeatureInput:
    """Make features `[V+1, D]` of norm 1, 65,536 rows at a time.

    A vector is the direction of the item's category, weighted by `signal`, plus noise weighted by `sqrt(1 -
    signal^2)`.
    """
    key = int.from_bytes(hashlib.sha256(name.encode()).digest()[:4], "little")
    rng = np.random.default_rng([seed, FEATURE_STREAM, key])
    num_items = len(catalogue.item)
    direction = rng.standard_normal((len(catalogue.edge) - 1, modality.dim), dtype=np.float32)
    direction /= np.linalg.norm(direction, axis=1, keepdims=True)
    values = np.zeros((num_items + 1, modality.dim), dtype=np.float16)
    noise_scale = ((1 - modality.signal**2) / modality.dim) ** 0.5  # a draw of D normals has norm sqrt(D)
    for begin in range(0, num_items, ROWS_AT_ONCE):
        category = catalogue.category[begin : begin + ROWS_AT_ONCE]
        noise = rng.standard_normal((len(category), modality.dim), dtype=np.float32)
        rows = modality.signal * direction[category] + noise_scale * noise
        rows /= np.linalg.norm(rows, axis=1, keepdims=True)
        values[begin + 1 : begin + 1 + len(category)] = rows
    present = np.concatenate([[False], rng.random(num_items) >= modality.missing])
    values[~present] = 0
    return FeatureInput(name, values, present, encoder="planted")
