"""Serving a stream of events with FindRec: a user's state is kept, one event appended, next items ranked.

Appending costs the same however long the history is: the Mamba stream keeps a state of fixed size, attention
the keys and values of the events in its window, the own-item head the items of those in its own. (With
`model.routing.window=0` attention sees all events, and both memory and cost grow with them.) What is ranked
equals the full forward pass over the whole history, up to rounding.
"""

from __future__ import annotations

from collections import Counter, deque
from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import islice

import torch
from torch import Tensor
from torch.nn import functional as F

from findrec.datasets.batch import Batch
from findrec.datasets.catalogue import ItemFeatures
from findrec.datasets.padding import gap_bucket
from findrec.errors import FindRecError
from findrec.models.findrec import FindRec
from findrec.models.mamba import MambaState, MambaStream
from findrec.models.repeat import OWN_WINDOW
from findrec.ops.own_bonus import RECENT, repeat_features


@dataclass
class UserState:
    """Everything that is remembered of one user; `StreamingFindRec.append` changes it in place."""

    stream: list[MambaState]
    memory: Tensor | None  # keys and values of the control's attention; None without modalities
    vector_d: Tensor | None = None  # user vector before the moment of asking and the last norm
    num_events: int = 0
    timestamp: int = 0  # seconds, of the last event
    lately: deque[int] = field(default_factory=deque)  # items of the events in the own items' window
    times_met: Counter[int] = field(default_factory=Counter)  # of those items
    last_met: dict[int, int] = field(default_factory=dict)  # number of the event, from 0


class StreamingFindRec:
    """A trained FindRec with its item table, one user at a time."""

    def __init__(
        self,
        model: FindRec,
        table_weight: Tensor,
        catalogue: ItemFeatures,
        own_window: int = OWN_WINDOW,
    ) -> None:
        """`table_weight` is `[V + 1, d]`; an item counts as the user's own for `own_window` events. Raises
        `FindRecError` for a stream other than Mamba, whose state would grow with the history.
        """
        if not isinstance(model.stream, MambaStream):
            raise FindRecError(
                f"streaming needs model.stream.kind=mamba, this model has {model.config.stream.kind!r}"
            )
        self._model, self._stream, self._catalogue = model.eval(), model.stream, catalogue
        self._own_window = own_window
        self._rows_Vd = table_weight.detach().float()
        self.items_Vd = model.item_vectors(self._rows_Vd, catalogue)

    @torch.no_grad()
    def start(
        self, items: Sequence[int] = (), timestamps: Sequence[int] = (), events: Sequence[int] = ()
    ) -> UserState:
        """The state after a history (ids 1..V, seconds, codes of event types), oldest event first.

        All events but the last are read in one parallel pass. Raises `ValueError` as `append` does.
        """
        times = list(timestamps) if len(timestamps) else [0] * len(items)
        codes = list(events) if len(events) else [None] * len(items)
        state = UserState(stream=self._stream.initial_state(1), memory=None)
        earlier = max(0, len(items) - 1)
        batch = self._batch(state, items[:earlier], times[:earlier], codes[:earlier])
        entered_1Ld, latents_M1Ld = self._look_up(batch)
        stream_1Ld, state.stream = self._stream.prefill(entered_1Ld, batch.length)
        if self._model.control is not None:
            state.memory = self._model.control.remember(stream_1Ld, latents_M1Ld)
        for item, now in zip(items[:earlier], times, strict=False):
            self._remember(state, item, now)
        if len(items):
            self.append(state, items[-1], times[-1], codes[-1])
        return state

    @torch.no_grad()
    def append(
        self, state: UserState, item: int, timestamp: int | None = None, event: int | None = None
    ) -> None:
        """One more event of the user. Raises `ValueError` for an unknown item or a time before the last."""
        now = state.timestamp if timestamp is None else timestamp
        entered_11d, latents_M11d = self._look_up(self._batch(state, [item], [now], [event]))
        vector_1d, state.stream = self._stream.step(entered_11d[:, 0], state.stream)
        if self._model.control is not None and state.memory is not None:
            z_M1d = torch.cat(latents_M11d)
            correction_1d, state.memory = self._model.control.step(vector_1d, z_M1d, state.memory)
            vector_1d = vector_1d + correction_1d
        state.vector_d = vector_1d[0]
        self._remember(state, item, now)

    def _look_up(self, batch: Batch) -> tuple[Tensor, list[Tensor]]:
        """What enters the stream, `[1, L, d]`, and each modality's latents of the same events."""
        features = self._catalogue.features(batch.ids)
        latents = [encoder(features[name]).z_Ud for name, encoder in self._model.encoders.items()]
        entered_1Ld = self._model.embed(batch, self._rows_Vd[batch.ids], features)
        return entered_1Ld, [F.embedding(batch.index, z_Ud) for z_Ud in latents]

    def _batch(
        self, state: UserState, items: Sequence[int], times: Sequence[int], events: Sequence[int | None]
    ) -> Batch:
        """The events that follow `state`, as one row."""
        for item in items:
            if not 1 <= item < len(self._rows_Vd):
                raise ValueError(f"item {item} is not in the catalogue: ids are 1..{len(self._rows_Vd) - 1}")
        before = [state.timestamp if state.num_events else times[0], *times[:-1]] if times else []
        for earlier, now in zip(before, times, strict=True):
            if now < earlier:
                raise ValueError(
                    f"an event at {now} s cannot follow one at {earlier} s: events come in order of time"
                )
        gaps = [gap_bucket(now - earlier) for earlier, now in zip(before, times, strict=True)]
        if gaps and not state.num_events:
            gaps[0] = 0  # nothing came before
        return Batch.build(
            item=torch.tensor([items], dtype=torch.int64),
            length=torch.tensor([len(items)]),
            user=torch.zeros(1, dtype=torch.int64),
            position=torch.zeros(0, dtype=torch.int64),
            target=torch.zeros(0, dtype=torch.int64),
            gap=torch.tensor([gaps], dtype=torch.int64),
            event=torch.tensor([[1 if event is None else event + 2 for event in events]], dtype=torch.int64),
        )

    def _remember(self, state: UserState, item: int, now: int) -> None:
        """Count an event in, and out the one that leaves the window of own items."""
        state.timestamp = now
        state.times_met[item] += 1
        state.last_met[item] = state.num_events
        state.lately.append(item)
        state.num_events += 1
        if len(state.lately) > self._own_window:
            gone = state.lately.popleft()
            state.times_met[gone] -= 1
            if not state.times_met[gone]:
                del state.times_met[gone], state.last_met[gone]

    @torch.no_grad()
    def scores(self, state: UserState, now: int | None = None) -> Tensor:
        """`[V + 1]` scores of all items (padding: -inf), asked for at `now` (seconds; default: at once).

        Raises `ValueError` for a user without events: there is nothing to go by.
        """
        if state.vector_d is None:
            raise ValueError("a user without events has no vector; append an event first")
        h_1d = state.vector_d[None]
        if self._model.moment is not None:
            later = max(0, (state.timestamp if now is None else now) - state.timestamp)
            h_1d = self._model.moment.at(h_1d, torch.tensor([gap_bucket(later)]))
        h_1d = self._model.norm(h_1d)
        scores_V: Tensor = self.items_Vd @ h_1d[0]
        if self._model.repeat_head is not None:
            own = list(state.times_met)
            recent = Counter(islice(reversed(state.lately), RECENT))
            phi_NR = repeat_features(
                count=torch.tensor([float(state.times_met[item]) for item in own]),
                lag=torch.tensor([float(state.num_events - 1 - state.last_met[item]) for item in own]),
                recent=torch.tensor([float(recent[item]) for item in own]),
            )
            scores_V[own] += phi_NR @ self._model.repeat_head(h_1d)[0]
        scores_V[0] = -torch.inf
        return scores_V

    def recommend(
        self, state: UserState, k: int, now: int | None = None, allowed: Tensor | None = None
    ) -> list[tuple[int, float]]:
        """The k items of highest score, `(item, score)`, best first.

        `allowed` are the items that may be shown: their ids (1..V), or a bool `[V + 1]` that marks them, as
        `Candidates.at` makes it. Where fewer than k may be shown, or have a score that is a number, these are
        all. Raises `ValueError` for what is no allow-list of the catalogue.
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
                raise ValueError(
                    f"allowed is a mask of shape {tuple(allowed.shape)}: give [{size}], the item ids and 0"
                )
            return allowed
        if allowed.is_floating_point() or ((allowed < 1) | (allowed >= size)).any():
            raise ValueError(f"allowed holds what is no item of the catalogue: ids are 1..{size - 1}")
        mask_V = torch.zeros(size, dtype=torch.bool)
        mask_V[allowed] = True
        return mask_V
