"""Streaming inference with a recurrent stream: keeps the state of a user, appends events and ranks items.

The cost of an event does not depend on the length of the history: the stream has a state of fixed size, and
the repeat bonus the items in its window. Scores equal those of the forward pass over the whole history, up to
rounding.
"""

from __future__ import annotations

from collections import Counter, deque
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from itertools import islice
from typing import Any, Protocol, runtime_checkable

import torch
from torch import Tensor, nn

from findrec.datasets.batches.batch import Batch
from findrec.datasets.batches.catalogue import ItemFeatures
from findrec.datasets.batches.padding import gap_bucket
from findrec.datasets.folder.features import ModalRows
from findrec.errors import FindRecError
from findrec.models.parts.layers import WaitTimeModulation
from findrec.models.parts.repeat import REPEAT_WINDOW, RepeatHead
from findrec.ops.repeat_bonus import RECENT, repeat_features


@runtime_checkable
class RecurrentStream(Protocol):
    """Layers whose state has a fixed size: equal to one pass over whole histories, up to rounding.

    Rows of `x_BLd` are right-padded: the state is that after `length_B` (0 to L) events, and outputs from
    there on are undefined.
    """

    def initial_state(self, batch_size: int) -> Any:
        """The state of rows without events."""

    def prefill(self, x_BLd: Tensor, length_B: Tensor, states: Any = None) -> tuple[Tensor, Any]:
        """Outputs `[B, L, d]` of histories that continue `states` (None: no events), and the new state."""

    def step(self, x_Bd: Tensor, states: Any) -> tuple[Tensor, Any]:
        """The output `[B, d]` of one more event, and the new state; `states` is not modified."""


class Streamable(Protocol):
    """What `StreamingModel` needs of a model; `stream` must be a `RecurrentStream`."""

    config: Any
    stream: nn.Module
    moment: WaitTimeModulation | None
    repeat_head: RepeatHead | None

    @property
    def norm(self) -> nn.Module:
        """The last map to user vectors."""

    def eval(self) -> Any:
        """Evaluation mode."""

    def item_vectors(self, rows_nd: Tensor, catalogue: ItemFeatures, part: range | None = None) -> Tensor:
        """The vectors that items are scored by."""

    def stream_inputs(self, batch: Batch, rows: Tensor, features: Mapping[str, ModalRows]) -> Tensor:
        """The inputs of the stream `[B, L, d]` in evaluation mode; arguments as in `forward`."""


@dataclass
class UserState:
    """The state of one user, which `StreamingModel.append` changes in place."""

    stream: Any  # of the `RecurrentStream`
    cache: Tensor | None = None  # further state of a subclass
    vector_d: Tensor | None = None  # user vector before the wait-time modulation and the last norm
    num_events: int = 0
    timestamp: int = 0  # seconds, of the last event
    recent_items: deque[int] = field(default_factory=deque)  # items of the events in the repeat window
    event_counts: Counter[int] = field(default_factory=Counter)  # of each of these items
    last_event: dict[int, int] = field(default_factory=dict)  # index of the last event of each item, from 0


class StreamingModel:
    """A trained model with its item table, one user at a time."""

    def __init__(
        self,
        network: Streamable,
        table_weight: Tensor,
        catalogue: ItemFeatures,
        repeat_window: int = REPEAT_WINDOW,
    ) -> None:
        """Prepare streaming with the table rows `[V + 1, d]`; `repeat_window` as in `repeat_candidates`.

        Raises `FindRecError` for streams that cannot append events at a cost independent of the history.
        """
        stream = network.stream
        if not isinstance(stream, RecurrentStream):
            kind = network.config.stream.kind
            raise FindRecError(f"streaming needs the stream.kind=mamba of a model, but this one has {kind!r}")
        network.eval()
        self._model, self._stream, self._catalogue = network, stream, catalogue
        self._own_window = repeat_window
        self._rows_Vd = table_weight.detach().float()
        self.items_Vd = network.item_vectors(self._rows_Vd, catalogue)

    @torch.no_grad()
    def start(
        self, items: Sequence[int] = (), timestamps: Sequence[int] = (), events: Sequence[int] = ()
    ) -> UserState:
        """See `findrec.models.capabilities.Stream`; raises `ValueError` as `append` does.

        All events but the last are processed in one parallel pass.
        """
        times = list(timestamps) if len(timestamps) else [0] * len(items)
        codes = list(events) if len(events) else [None] * len(items)
        state = UserState(stream=self._stream.initial_state(1))
        earlier = max(0, len(items) - 1)
        self._open(state, self._batch(state, items[:earlier], times[:earlier], codes[:earlier]))
        for item, now in zip(items[:earlier], times, strict=False):
            self._record(state, item, now)
        if len(items):
            self.append(state, items[-1], times[-1], codes[-1])
        return state

    @torch.no_grad()
    def append(
        self, state: UserState, item: int, timestamp: int | None = None, event: int | None = None
    ) -> None:
        """Append an event; raises `ValueError` for an unknown item or a time before the last event."""
        now = state.timestamp if timestamp is None else timestamp
        vector_1d = self._advance(state, self._batch(state, [item], [now], [event]))
        state.vector_d = vector_1d[0]
        self._record(state, item, now)

    def _inputs(self, batch: Batch) -> Tensor:
        features = self._catalogue.features(batch.ids)
        return self._model.stream_inputs(batch, self._rows_Vd[batch.ids], features)

    def _open(self, state: UserState, batch: Batch) -> None:
        """Process the events of `batch`, the first ones of a user, in one parallel pass."""
        _, state.stream = self._stream.prefill(self._inputs(batch), batch.length)

    def _advance(self, state: UserState, batch: Batch) -> Tensor:
        """Process the single event of `batch`; returns the output of the stream `[1, d]`."""
        vector_1d: Tensor
        vector_1d, state.stream = self._stream.step(self._inputs(batch)[:, 0], state.stream)
        return vector_1d

    def _batch(
        self, state: UserState, items: Sequence[int], times: Sequence[int], events: Sequence[int | None]
    ) -> Batch:
        """A batch of one row with the events that follow `state`."""
        for item in items:
            if not 1 <= item < len(self._rows_Vd):
                raise ValueError(f"item {item} is not in the catalogue: ids are 1..{len(self._rows_Vd) - 1}")
        before = [state.timestamp if state.num_events else times[0], *times[:-1]] if times else []
        for earlier, now in zip(before, times, strict=True):
            if now < earlier:
                raise ValueError(
                    f"an event at {now} s cannot follow one at {earlier} s: events must be in order of time"
                )
        gaps = [gap_bucket(now - earlier) for earlier, now in zip(before, times, strict=True)]
        if gaps and not state.num_events:
            gaps[0] = 0  # the first event
        return Batch.build(
            item=torch.tensor([items], dtype=torch.int64),
            length=torch.tensor([len(items)]),
            user=torch.zeros(1, dtype=torch.int64),
            position=torch.zeros(0, dtype=torch.int64),
            target=torch.zeros(0, dtype=torch.int64),
            gap=torch.tensor([gaps], dtype=torch.int64),
            time=torch.tensor([times], dtype=torch.int64),
            event=torch.tensor([[1 if event is None else event + 2 for event in events]], dtype=torch.int64),
        )

    def _record(self, state: UserState, item: int, now: int) -> None:
        """Add an event to the repeat window and remove the one that leaves it."""
        state.timestamp = now
        state.event_counts[item] += 1
        state.last_event[item] = state.num_events
        state.recent_items.append(item)
        state.num_events += 1
        if len(state.recent_items) > self._own_window:
            oldest = state.recent_items.popleft()
            state.event_counts[oldest] -= 1
            if not state.event_counts[oldest]:
                del state.event_counts[oldest], state.last_event[oldest]

    @torch.no_grad()
    def scores(self, state: UserState, now: int | None = None) -> Tensor:
        """Scores `[V + 1]` of all items (padding: -inf) at the time `now` (s, default: the last event).

        Raises `ValueError` for a user without events.
        """
        if state.vector_d is None:
            raise ValueError("a user without events has no vector; append an event first")
        h_1d = state.vector_d[None]
        if self._model.moment is not None:
            wait = max(0, (state.timestamp if now is None else now) - state.timestamp)
            h_1d = self._model.moment.at(h_1d, torch.tensor([gap_bucket(wait)]))
        h_1d = self._model.norm(h_1d)
        scores_V: Tensor = self.items_Vd @ h_1d[0]
        if self._model.repeat_head is not None:
            candidates = list(state.event_counts)
            recent = Counter(islice(reversed(state.recent_items), RECENT))
            lags = [state.num_events - 1 - state.last_event[item] for item in candidates]
            phi_NR = repeat_features(
                count=torch.tensor([float(state.event_counts[item]) for item in candidates]),
                lag=torch.tensor([float(lag) for lag in lags]),
                recent=torch.tensor([float(recent[item]) for item in candidates]),
            )
            scores_V[candidates] += phi_NR @ self._model.repeat_head(h_1d)[0]
        scores_V[0] = -torch.inf
        return scores_V

    def recommend(
        self, state: UserState, k: int, now: int | None = None, allowed: Tensor | None = None
    ) -> list[tuple[int, float]]:
        """The k items with the highest scores, as `(item, score)`, best first.

        `allowed` restricts the items: their ids (1..V), or a bool mask `[V + 1]` as returned by
        `Candidates.at`. Fewer than k are returned if fewer are allowed or have a finite score. Raises
        `ValueError` for an invalid `allowed`.
        """
        scores_V = self.scores(state, now)
        if allowed is not None:
            scores_V[~self._mask(allowed)] = -torch.inf
        best = scores_V.nan_to_num_(nan=-torch.inf, neginf=-torch.inf).topk(min(k, len(scores_V) - 1))
        pairs = zip(best.indices.tolist(), best.values.tolist(), strict=True)
        return [(item, score) for item, score in pairs if score > -torch.inf]

    def _mask(self, allowed: Tensor) -> Tensor:
        size = len(self._rows_Vd)
        if allowed.dtype == torch.bool:
            if allowed.shape != (size,):
                raise ValueError(f"allowed is a mask of shape {tuple(allowed.shape)}, but must be [{size}]")
            return allowed
        if allowed.is_floating_point() or ((allowed < 1) | (allowed >= size)).any():
            raise ValueError(f"allowed contains ids outside of the catalogue, which are 1..{size - 1}")
        mask_V = torch.zeros(size, dtype=torch.bool)
        mask_V[allowed] = True
        return mask_V
