"""Generate synthetic histories in blocks of users: lengths, sessions, timestamps, then items.

A block depends only on the seed and its index. Within a block everything is vectorised over the events: a
repeat is a pointer to an earlier event of the same user, and chains of pointers are followed by doubling
(each step replaces a pointer by its target's), so there is no loop over the events.

N: events of the block, R: users, S: sessions.
"""

from __future__ import annotations

from dataclasses import dataclass
from statistics import NormalDist

import numpy as np
from numpy.typing import NDArray

from findrec.datasets.folder.writer import Block
from findrec.datasets.stats.statistics import SESSION_GAP_S
from findrec.datasets.synthetic.items import EVENT_STREAM, PILOT_STREAM, Catalogue
from findrec.datasets.synthetic.profile import Lengths, Profile, Sessions

USERS_PER_BLOCK = 512
FIRST_SECOND = 1_420_070_400  # 2015-01-01
DAY_S = 86_400
FREE_AFTER = 12  # number of draws within the category; later draws use all categories
MOST_DRAWS = 100  # attempts to draw an item available at the event's time
PILOT_USERS = 256
PILOT_ROUNDS = 5
MOST_ROUNDS = 10  # rounds of redrawing items already in the history

Int64Array = NDArray[np.int64]
Float64Array = NDArray[np.float64]
BoolArray = NDArray[np.bool_]


def fit_lengths(lengths: Lengths) -> tuple[float, float]:
    """Fit `(mu, sigma)` of a lognormal that has the profile's log moments after rounding and clipping."""
    normal = NormalDist()
    z = np.array([normal.inv_cdf((k + 0.5) / 4096) for k in range(4096)])
    mu, sigma = lengths.mu, lengths.sigma
    for _ in range(200):
        log = np.log(_clipped(lengths, mu + sigma * z))
        mu += lengths.mu - float(log.mean())
        sigma *= (lengths.sigma + 1e-6) / (float(log.std()) + 1e-6)
        sigma = min(sigma, 10.0)  # for when clipping limits the spread
    return mu, sigma


def _clipped(lengths: Lengths, log: Float64Array) -> Int64Array:
    length = np.rint(np.exp(np.minimum(log, 20.0)))
    return np.clip(length, lengths.minimum, lengths.maximum).astype(np.int64)


def _running(values: Float64Array, begins: BoolArray) -> Float64Array:
    """Running sums that restart (without the first value) where `begins` is True."""
    total = np.cumsum(values)
    starts = np.flatnonzero(begins)
    return total - np.repeat(total[starts], np.diff(np.append(starts, len(values))))


def _session_begins(rng: np.random.Generator, sessions: Sessions, first: BoolArray) -> BoolArray:
    """`[N]` True where a session begins; sessions never cross users."""
    begins = first.copy()
    mean = sessions.short_mean + sessions.long_share * (sessions.long_mean - sessions.short_mean)
    end = 0
    while end < len(first):
        num_draws = int((len(first) - end) / mean * 1.1) + 16
        means = np.where(rng.random(num_draws) < sessions.long_share, sessions.long_mean, sessions.short_mean)
        ends = end + np.cumsum(rng.geometric(1 / means))
        begins[ends[ends < len(first)]] = True
        end = int(ends[-1])
    return begins


@dataclass(frozen=True)
class _Frame:
    """Users, sessions and timestamps of a block, without items."""

    row: Int64Array  # [N] user
    session: Int64Array  # [N]
    session_start: Int64Array  # [S+1] first event of each, and N
    session_row: Int64Array  # [S]
    timestamp: Int64Array  # [N]


class EventMaker:
    """Generates the histories of `num_users` users, block by block."""

    def __init__(self, profile: Profile, catalogue: Catalogue, num_users: int, seed: int) -> None:
        self.num_users = num_users
        self.num_blocks = -(-num_users // USERS_PER_BLOCK)
        self._profile = profile
        self._catalogue = catalogue
        self._seed = seed
        self._mu, self._sigma = fit_lengths(profile.lengths)
        self._span_s = profile.activity.span_days * DAY_S
        self._copy_rate = self._fit_copy_rate() if profile.repeats.rate else 0.0

    def block(self, index: int) -> Block:
        """Histories of block `index`, oldest event first; every user has at least one event."""
        rng = np.random.default_rng([self._seed, EVENT_STREAM, index])
        num_rows = min(USERS_PER_BLOCK, self.num_users - index * USERS_PER_BLOCK)
        log = self._mu + self._sigma * rng.standard_normal(num_rows)
        return self._histories(rng, _clipped(self._profile.lengths, log))

    def _fit_copy_rate(self) -> float:
        """Fit the probability of copying an earlier event to the profile's repeat rate.

        Popular items also repeat by chance, more often in a small catalogue, and first sessions have nothing
        to copy. Both are measured on a pilot of 256 users with evenly spread lengths. Where chance alone
        exceeds the rate (histories as long as the catalogue), nothing is copied.
        """
        z = np.array([NormalDist().inv_cdf((k + 0.5) / PILOT_USERS) for k in range(PILOT_USERS)])
        length = _clipped(self._profile.lengths, self._mu + self._sigma * z)
        row = np.repeat(np.arange(PILOT_USERS), length)
        target_rate = self._copy_rate = self._profile.repeats.rate
        for _ in range(PILOT_ROUNDS):
            rng = np.random.default_rng([self._seed, PILOT_STREAM])
            item = self._histories(rng, length).columns["item"]
            rate = _seen_before(row * (len(self._catalogue.item) + 1) + item).mean()
            self._copy_rate = min(max(self._copy_rate + target_rate - float(rate), 0.0), 1.0)
        return self._copy_rate

    def _histories(self, rng: np.random.Generator, length: Int64Array) -> Block:
        if self._profile.repeats.rate == 0:  # histories cannot be longer than the catalogue
            length = np.minimum(length, max(1, len(self._catalogue.item) // 2))
        frame = self._frame(rng, length)
        source = self._sources(rng, frame)
        fresh = np.flatnonzero(source == np.arange(len(source)))
        index, kept = self._fresh_items(rng, frame, fresh)
        item = np.zeros(len(source), dtype=np.int64)
        item[fresh] = self._catalogue.item[index]
        item = item[source]
        timestamp = frame.timestamp
        if not kept.all():  # only without repeats, where all events are fresh
            item, timestamp = item[kept], timestamp[kept]
            length = np.bincount(frame.row[kept], minlength=len(length))
        return Block({"item": item, "timestamp": timestamp}, length)

    def _frame(self, rng: np.random.Generator, length: Int64Array) -> _Frame:
        sessions, activity = self._profile.sessions, self._profile.activity
        row = np.repeat(np.arange(len(length)), length)
        first = np.zeros(len(row), dtype=bool)
        first[np.cumsum(length) - length] = True
        begins = _session_begins(rng, sessions, first)
        start = np.flatnonzero(begins)
        session = np.cumsum(begins) - 1
        session_row = row[start]
        # Within a session: exponential pauses, capped so that they never end it.
        pause = np.zeros(len(row))
        if sessions.within_seconds:
            pause = np.minimum(np.floor(rng.exponential(sessions.within_seconds, len(row))), SESSION_GAP_S)
        inside = _running(pause, begins)
        # Sessions fall into the user's active time as the points of a Poisson process do, pushed apart so
        # that no two of them merge.
        duration = inside[np.append(start[1:], len(row)) - 1]
        active_s = (
            activity.active_days * DAY_S * np.exp(activity.active_sigma * rng.standard_normal(len(length)))
        )
        active_s = np.minimum(active_s, self._span_s)
        begin_s = rng.random(len(length)) * (self._span_s - active_s)
        first_session = np.append(True, np.diff(session_row) > 0)
        gap = rng.exponential(1.0, len(start))
        since = _running(gap, first_session)
        before_s = rng.exponential(1.0, len(length))
        total_s = np.bincount(session_row, gap, minlength=len(length)) + before_s
        share = (since + before_s[session_row]) / total_s[session_row]
        apart = duration + SESSION_GAP_S + 60
        shift = _running(apart, first_session) - apart + apart[first_session][session_row]
        at = begin_s[session_row] + share * active_s[session_row] + shift
        timestamp = FIRST_SECOND + np.floor(at[session] + inside).astype(np.int64)
        return _Frame(row, session, np.append(start, len(row)), session_row, timestamp)

    def _sources(self, rng: np.random.Generator, frame: _Frame) -> Int64Array:
        """`[N]` index of the event that provides each event's item: itself, or an earlier one."""
        repeats, num = self._profile.repeats, len(frame.row)
        source = np.arange(num)
        if repeats.rate == 0:
            return source
        copies = np.flatnonzero(rng.random(num) < self._copy_rate)
        lag = np.exp(np.log(repeats.lag_median) + repeats.lag_sigma * rng.standard_normal(len(copies)))
        back = frame.session[copies] - np.maximum(np.rint(np.minimum(lag, 1e9)), 1).astype(np.int64)
        possible = back >= 0
        possible[possible] = frame.session_row[back[possible]] == frame.row[copies[possible]]
        copies, back = copies[possible], back[possible]
        size = np.diff(frame.session_start)[back]
        source[copies] = frame.session_start[back] + (rng.random(len(copies)) * size).astype(np.int64)
        while True:
            doubled = source[source]
            if np.array_equal(doubled, source):
                return source
            source = doubled

    def _categories(self, rng: np.random.Generator, frame: _Frame, fresh: Int64Array) -> Int64Array:
        """Category of each fresh event: that of the previous one in the session, or a new choice."""
        taste, edge = self._profile.taste, self._catalogue.edge

        def choose(size: int | tuple[int, int]) -> Int64Array:
            drawn = np.searchsorted(edge, edge[-1] * rng.random(size), side="right") - 1
            return np.asarray(np.minimum(drawn, len(edge) - 2))

        favourite = choose((int(frame.row[-1]) + 1, taste.favourites))
        is_new = np.diff(frame.session[fresh], prepend=-1) > 0
        is_new |= rng.random(len(fresh)) >= taste.persistence
        row = frame.row[fresh[is_new]]
        own = favourite[row, rng.integers(taste.favourites, size=len(row))]
        chosen = np.where(rng.random(len(row)) < taste.loyalty, own, choose(len(row)))
        return np.asarray(chosen[np.cumsum(is_new) - 1])

    def _fresh_items(
        self, rng: np.random.Generator, frame: _Frame, fresh: Int64Array
    ) -> tuple[Int64Array, BoolArray]:
        """Catalogue indices of the fresh events' items, and a mask of the events to keep.

        Without repeats, items that the user already had are redrawn, from any category after the first
        redraw; remaining duplicates are dropped.
        """
        category = self._categories(rng, frame, fresh)
        time = ((frame.timestamp[fresh] - FIRST_SECOND) / self._span_s).clip(0, 1).astype(np.float32)
        index = self._draw(rng, category, time)
        double = np.zeros(len(fresh), dtype=bool)
        if self._profile.repeats.rate == 0:
            key_of_row = frame.row[fresh] * len(self._catalogue.item)
            for again in range(MOST_ROUNDS):
                double = _seen_before(key_of_row + index)
                wrong = np.flatnonzero(double)
                if not len(wrong):
                    break
                index[wrong] = self._draw(rng, category[wrong], time[wrong], free=again > 0)
            else:
                double = _seen_before(key_of_row + index)
        return index, ~double

    def _draw(
        self, rng: np.random.Generator, category: Int64Array, time: NDArray[np.float32], free: bool = False
    ) -> Int64Array:
        """Draw by weight, from the category unless `free`, and reject by the item's popularity at `time`."""
        catalogue, outside = self._catalogue, self._profile.drift.outside
        index = np.zeros(len(time), dtype=np.int64)
        wrong = np.arange(len(time))
        low, high = catalogue.edge[category], catalogue.edge[category + 1]
        for draw in range(MOST_DRAWS):
            if free or draw >= FREE_AFTER:
                low, high = np.zeros(len(wrong)), np.full(len(wrong), catalogue.total[-1])
            drawn = catalogue.draw(low, high, rng.random(len(wrong)))
            index[wrong] = drawn
            now = time[wrong]
            faded = (now < catalogue.peak[drawn]) | (now >= catalogue.past[drawn])
            away = (now < catalogue.born[drawn]) | (faded & (rng.random(len(wrong)) >= outside))
            wrong, low, high = wrong[away], low[away], high[away]
            if not len(wrong):
                break
        return index


def _seen_before(key: Int64Array) -> BoolArray:
    """True for elements that are equal to an earlier one."""
    order = np.argsort(key, kind="stable")
    seen = np.zeros(len(key), dtype=bool)
    seen[order[1:]] = np.diff(key[order]) == 0
    return seen
