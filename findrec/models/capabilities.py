"""Optional capabilities of models, as protocols: use `isinstance(model, Explains)` and the like.

Shape letters: T target positions, H heads, E experts, V items, d width, k items of a list.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol, runtime_checkable

import torch
from torch import Tensor

from findrec.datasets.batches.batch import Batch
from findrec.datasets.batches.catalogue import ItemFeatures
from findrec.datasets.folder.features import ModalRows
from findrec.models.base import Out


@dataclass(frozen=True)
class Explanation:
    """The output of a model for one batch, and its output without parts of the input."""

    whole: Out
    gates_THE: Tensor  # weights of each head's experts, which sum to 1
    experts: tuple[str, ...]  # E names
    without: dict[str, Out]  # by modality: the output without that modality
    bare: Out  # the output without any modality
    shuffled: list[Out]  # outputs with gates permuted among positions or items; may be empty


def withhold(features: Mapping[str, ModalRows], names: Sequence[str]) -> dict[str, ModalRows]:
    """The features with the modalities `names` marked as missing at every item."""
    return {
        name: ModalRows(torch.zeros_like(rows.values), torch.zeros_like(rows.present))
        if name in names
        else rows
        for name, rows in features.items()
    }


def occlude(
    model: Callable[..., Out], batch: Batch, x_items: Tensor, features: Mapping[str, ModalRows]
) -> tuple[dict[str, Out], Out]:
    """The outputs of a model without each modality, by name, and without any of them."""
    without = {name: model(batch, x_items, withhold(features, [name])) for name in features}
    return without, model(batch, x_items, withhold(features, list(features)))


def random_cycle(count: int, generator: torch.Generator) -> Tensor:
    """A random permutation of `count` >= 2 elements that leaves none in its place, to shuffle gates."""
    cycle = torch.randperm(count, generator=generator)
    order = torch.empty_like(cycle)
    order[cycle] = cycle.roll(1)
    return order


@runtime_checkable
class Explains(Protocol):
    """A multimodal model that can attribute its output to modalities."""

    # Prefixes of the names under which training logs the alignment of modalities, and what each measures.
    alignment_diagnostics: Mapping[str, str]

    def explain(self, batch: Batch, x_items: Tensor, features: Mapping[str, ModalRows]) -> Explanation:
        """Run the model in evaluation mode; arguments as in `SequenceModel.forward`.

        Raises `ValueError` for a model that was built without modalities.
        """


@runtime_checkable
class SignedScores(Protocol):
    """A model whose inner products have a sign for each coordinate (a Lorentzian product)."""

    score_signs: Tensor  # [d], +1 or -1


@runtime_checkable
class LimitedHistory(Protocol):
    """A model that limits the length of histories, for example by learned positions."""

    @property
    def longest_history(self) -> int | None:
        """The largest number of events of a history; None if this configuration has no limit."""


@dataclass(frozen=True)
class UserItemVectors:
    """The vectors of all users and items of a trained model, whose inner products are the scores.

    A user without training events, or who is not in the data, gets
    `fold_in(sum over the distinct items of the history of folded_Ve, number of these items)`.
    """

    users_Ud: Tensor  # [U, d] float32, U rows of the table of users
    items_Vd: Tensor  # [V, d] float32
    known_U: Tensor  # [U] bool, users with training events; False for padding
    folded_Ve: Tensor  # [V, e] float32
    fold_in: Callable[[Tensor, Tensor], Tensor]  # of `[n, e]` and float32 counts `[n]` (>= 0), to `[n, d]`


@runtime_checkable
class RanksUsers(Protocol):
    """A model with a vector for each user of the data, ranked by `UserItemScorer`."""

    def user_item_vectors(self, tables: Mapping[str, Tensor], features: ItemFeatures) -> UserItemVectors:
        """The vectors, from the rows of all tables by name, on their device."""


class Stream(Protocol):
    """Keeps user states to which events are appended one at a time; ranks equal those of whole histories."""

    items_Vd: Tensor  # [V + 1, d] the vectors that items are scored by

    def start(
        self, items: Sequence[int] = (), timestamps: Sequence[int] = (), events: Sequence[int] = ()
    ) -> Any:
        """The state after a history (ids 1..V, seconds, codes of event types), oldest event first."""

    def append(self, state: Any, item: int, timestamp: int | None = None, event: int | None = None) -> None:
        """Append an event to a state, in place."""

    def scores(self, state: Any, now: int | None = None) -> Tensor:
        """`[V + 1]` scores of all items (padding: -inf) at the time `now` (s)."""

    def recommend(
        self, state: Any, k: int, now: int | None = None, allowed: Tensor | None = None
    ) -> list[tuple[int, float]]:
        """The k items with the highest scores, as `(item, score)`, best first."""


@runtime_checkable
class Streams(Protocol):
    """A model that can stream: keep a user's state and append events to it."""

    def open_stream(self, rows_Vd: Tensor, catalogue: ItemFeatures) -> Stream:
        """A `Stream` that uses the rows `[V + 1, d]` of the item table.

        Raises `FindRecError` if this configuration of the model cannot stream.
        """
