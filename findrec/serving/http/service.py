"""What the HTTP service computes: lists for users with their appended events, and for visitors.

A user's history is that of the run's data followed by the appended events. Appended events that are not later
than the user's last event in the data are left out, if the data has them or they are earlier: the model was
trained again on newer data.
"""

from __future__ import annotations

import math
import time
from collections import Counter, OrderedDict, defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import islice
from typing import Any

import numpy as np

from findrec.datasets.folder.histories import Histories
from findrec.errors import FindRecError, suggest
from findrec.evaluation.scoring.allow_list import FILE
from findrec.evaluation.scoring.candidates import Candidates
from findrec.evaluation.scoring.users import UNKNOWN_USER, IntArray
from findrec.serving.http.events import Append, Event, EventStore, SentEvent
from findrec.serving.http.schemas import (
    AppendRequest,
    History,
    HistoryResponse,
    ListedItem,
    ListResponse,
    Named,
    PastEvent,
    RecommendRequest,
    SimilarList,
    SimilarRequest,
    SimilarResponse,
)
from findrec.serving.lists import ItemList, json_value
from findrec.serving.query_blocks import Asked
from findrec.serving.recommender import Recommender
from findrec.serving.visitors import reader_of

_CANDIDATES = 64  # allow-lists kept in memory
_NAMED = 20  # unknown items that a response names
_AHEAD_S = 86_400  # that events may be in the future: clocks and time zones may be wrong


class UnknownError(FindRecError):
    """Something that is named in a request does not exist."""


@dataclass(frozen=True)
class Question:
    """One list that is asked for: of a user, or of a visitor with a history."""

    user: str | None
    history: History | None
    k: int
    only: tuple[str, ...]
    exclude_seen: bool | None


@dataclass(frozen=True)
class _Past:
    """A history as item numbers; `user` is the row in the data folder."""

    items: IntArray
    times: IntArray
    events: IntArray | None
    time: int  # of the query, seconds
    user: int = UNKNOWN_USER
    unknown: tuple[str, ...] = ()


class Service:
    """Answers requests from a recommender and the appended events; thread-safe."""

    def __init__(self, recommender: Recommender, store: EventStore) -> None:
        self.recommender, self.store = recommender, store
        self.data = recommender.folder
        self._row_of = {user: row for row, user in enumerate(self.data.user_ids)}
        self._types = {name: code for code, name in enumerate(self.data.manifest.event_types)}
        self._candidates: OrderedDict[tuple[str, ...], Candidates] = OrderedDict()
        recommender.id_of, recommender.latest  # noqa: B018  computed before the first request

    def questions(self, request: RecommendRequest) -> list[Question]:
        """The lists that a request asks for.

        Raises `UnknownError` for users without events, and `FindRecError` for invalid conditions or times.
        """
        only = tuple(request.only)
        self.candidates(only)
        for user in request.users or ():
            if user not in self._row_of and not self.store.has(user):
                raise UnknownError(
                    f"user {user!r} has no events{suggest(user, self._row_of)}: append some, or give a "
                    "history"
                )
        for history in request.histories or ():
            self._check_history(history)
        common = (request.k, only, request.exclude_seen)
        if request.users is not None:
            return [Question(user, None, *common) for user in request.users]
        return [Question(None, history, *common) for history in request.histories or ()]

    def recommend(self, questions: Sequence[Question]) -> list[ListResponse | FindRecError]:
        """Answer questions, those with the same filters in one pass of the model."""
        answers: dict[int, ListResponse | FindRecError] = {}
        groups: dict[tuple[Any, ...], list[int]] = defaultdict(list)
        for number, one in enumerate(questions):
            groups[one.k, one.only, one.exclude_seen].append(number)
        for (k, only, exclude_seen), numbers in groups.items():
            try:
                pasts = [self._past(questions[number]) for number in numbers]
                labels = [questions[number].user or "" for number in numbers]
                asked = _asked(labels, pasts, typed=bool(self._types))
                lists = self.recommender.answer(asked, self.candidates(only), k, exclude_seen=exclude_seen)
            except FindRecError as error:
                answers |= dict.fromkeys(numbers, error)
                continue
            for number, past, found in zip(numbers, pasts, lists, strict=True):
                answers[number] = ListResponse(
                    user=questions[number].user,
                    ranked_by=found.ranked_by,
                    time=found.time,
                    items=listed(found),
                    unknown_items=list(past.unknown[:_NAMED]),
                )
        return [answers[number] for number in range(len(questions))]

    def similar(self, request: SimilarRequest) -> SimilarResponse:
        """The similar items of a request; raises `UnknownError` for unknown items."""
        for item in request.items:
            self._check_item(item)
        self.candidates(tuple(request.only))
        lists = self.recommender.similar_items(request.items, request.k, only=request.only)
        return SimilarResponse(
            lists=[SimilarList(item=one.item, title=one.title, items=listed(one)) for one in lists]
        )

    def appended(self, request: AppendRequest) -> Append:
        """The events of a request.

        Raises `UnknownError` for unknown items, and `FindRecError` for unknown event types or times in the
        future, after which no event with a true time could be appended.
        """
        end = max(int(time.time()), self.recommender.latest) + _AHEAD_S
        for one in request.events:
            self._check_item(one.item)
            self._check_type(one.event)
            if one.time is not None and one.time > end:
                raise FindRecError(
                    f"the time {one.time} of item {one.item!r} is in the future: give seconds since 1970, "
                    "not milliseconds"
                )
        events = [SentEvent(one.item, one.time, one.event, one.key) for one in request.events]
        return Append(request.user, events, self._last_time(request.user))

    def history(self, user: str, last: int) -> HistoryResponse:
        """The last events of a user; raises `UnknownError` for a user without events."""
        row = self._row_of.get(user)
        if row is None and not self.store.has(user):
            raise UnknownError(f"user {user!r} has no events{suggest(user, self._row_of)}")
        past = self._past_of_user(user)
        recommender, types = self.recommender, self.data.manifest.event_types
        known = 0 if row is None else int(self.data.length[row])
        events = []
        for at in range(max(0, len(past.items) - last), len(past.items)):
            item, code = int(past.items[at]), -1 if past.events is None else int(past.events[at])
            events.append(
                PastEvent(
                    item=recommender.item_ids[item - 1],
                    title=recommender.titles.of(item),
                    time=int(past.times[at]),
                    event=types[code] if code >= 0 else None,
                    appended=at >= known,
                )
            )
        return HistoryResponse(user=user, total=len(past.items), events=events)

    def items(self, words: str, limit: int) -> list[Named]:
        """Items whose id is `words` or whose title contains them, the most popular first."""
        wanted, recommender = words.strip().lower(), self.recommender
        if not wanted:
            return []
        by_id = recommender.id_of.get(words.strip())
        found = [] if by_id is None else [by_id]
        contain = (number for title, number in self._lower_titles if wanted in title and number != by_id)
        found += islice(contain, limit - len(found))
        return [Named(item=recommender.item_ids[n - 1], title=recommender.titles.of(n)) for n in found]

    @cached_property
    def _lower_titles(self) -> list[tuple[str, int]]:
        """Titles in lower case with the numbers of their items, the most popular item first."""
        order = np.argsort(-self.data.train_count[1:], kind="stable") + 1
        return [(self.recommender.titles.of(number).lower(), number) for number in order.tolist()]

    def users(self, beginning: str, limit: int) -> list[str]:
        """Ids of users that begin with `beginning`: of the data, then new ones."""
        known = islice((user for user in self._row_of if user.startswith(beginning)), limit)
        return list(dict.fromkeys([*known, *self.store.users(beginning, limit)]))[:limit]

    def candidates(self, only: tuple[str, ...]) -> Candidates:
        """The items that satisfy conditions; raises `FindRecError` for invalid ones."""
        if any(one.startswith(FILE) for one in only):
            raise FindRecError("only: requests do not read files; give conditions on columns of the items")
        found = self._candidates.get(only)
        if found is None:
            found = self._candidates[only] = self.recommender.candidates(only)
            while len(self._candidates) > _CANDIDATES:
                self._candidates.popitem(last=False)
        return found

    def _past(self, question: Question) -> _Past:
        if question.history is None:
            assert question.user is not None, "a question has one of both"
            return self._past_of_user(question.user)
        history, id_of = question.history, self.recommender.id_of
        numbers = [id_of.get(raw, 0) for raw in history.items]
        kept = np.flatnonzero(numbers)
        times = history.times or [self.recommender.latest] * len(numbers)
        types = [self._types.get(one or "", -1) for one in history.events or [None] * len(numbers)]
        return _Past(
            np.array(numbers, dtype=np.int64)[kept],
            np.array(times, dtype=np.int64)[kept],
            np.array(types, dtype=np.int64)[kept] if self._types else None,
            times[-1] if times else self.recommender.latest,  # the last item may be unknown
            unknown=tuple(raw for raw, number in zip(history.items, numbers, strict=True) if not number),
        )

    def _past_of_user(self, user: str) -> _Past:
        row = self._row_of.get(user)
        empty = np.zeros(0, dtype=np.int64)
        past = _Past(empty, empty, empty if self._types else None, self.recommender.latest)
        if row is not None:
            known = self.data.histories([row])
            past = _Past(known.item, known.timestamp, known.event, int(known.timestamp[-1]), row)
        id_of = self.recommender.id_of
        stored = [one for one in self.store.of(user) if one.item in id_of]
        more = stored if row is None else _later(stored, past, id_of)
        if not more:
            return past
        types = np.array([self._types.get(one.event or "", -1) for one in more], dtype=np.int64)
        return _Past(
            np.concatenate([past.items, np.array([id_of[one.item] for one in more], dtype=np.int64)]),
            np.concatenate([past.times, np.array([one.time for one in more], dtype=np.int64)]),
            None if past.events is None else np.concatenate([past.events, types]),
            more[-1].time,
            past.user,
        )

    def _last_time(self, user: str) -> int | None:
        """Time of the user's last event in the data; None for a user who is not there."""
        if (row := self._row_of.get(user)) is None:
            return None
        end = self.data.length[[row]]
        return int(self.data.histories([row], end - 1, end).timestamp[0])

    def _check_history(self, history: History) -> None:
        for at, one in enumerate(history.times or ()):
            if at and one < (history.times or ())[at - 1]:
                raise FindRecError(f"times decrease at position {at}: give the oldest event first")
        for kind in history.events or ():
            self._check_type(kind)

    def _check_item(self, item: str) -> None:
        if item not in self.recommender.id_of:
            raise UnknownError(f"no item {item!r}{suggest(item, self.recommender.id_of)}")

    def _check_type(self, kind: str | None) -> None:
        if kind is not None and kind not in self._types:
            known = ", ".join(self._types) or "the data has none"
            raise FindRecError(f"unknown event type {kind!r}{suggest(kind, self._types)} (types: {known})")


def _later(stored: Sequence[Event], past: _Past, id_of: Mapping[str, int]) -> list[Event]:
    """The appended events that a history of the data does not have.

    The data may end within a second in which several events were appended: its events of that second are
    taken off by item, one for one.
    """
    in_data = Counter(past.items[past.times == past.time].tolist())
    more = []
    for one in stored:
        if one.time == past.time and in_data[id_of[one.item]]:
            in_data[id_of[one.item]] -= 1
        elif one.time >= past.time:
            more.append(one)
    return more


def listed(found: ItemList) -> list[ListedItem]:
    """The entries of a list, with values that JSON has."""
    return [
        ListedItem(
            item=item,
            title=title,
            score=score if math.isfinite(score) else None,
            columns={name: json_value(column[rank]) for name, column in found.more.items()},
        )
        for rank, (item, title, score) in enumerate(zip(found.items, found.titles, found.scores, strict=True))
    ]


def _asked(labels: list[str], pasts: Sequence[_Past], *, typed: bool) -> Asked:
    length_B = np.array([len(past.items) for past in pasts], dtype=np.int64)
    joined = Histories(
        np.concatenate([past.items for past in pasts]),
        np.concatenate([past.times for past in pasts]),
        np.concatenate([[0], np.cumsum(length_B)]).astype(np.int64),
        np.concatenate([past.events for past in pasts if past.events is not None]) if typed else None,
    )
    times = np.array([past.time for past in pasts], dtype=np.int64)
    users = np.array([past.user for past in pasts], dtype=np.int64)
    return Asked(labels, length_B, times, reader_of(joined), users)
