"""The epoch plan: which examples (usually windows of histories) are in each microbatch of each step.

The plan depends only on the data folder and (seed, epoch), not on the number of workers: every step has the
same number K of microbatches, and rank r of W runs microbatches r, r + W, ... So any number of workers that
divides K computes the same sums, and no worker runs out of work early.
"""

from __future__ import annotations

import hashlib
import itertools
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from findrec.datasets.folder.data_folder import DataFolder
from findrec.datasets.folder.splits import Int64Array
from findrec.errors import FindRecError

CHUNK_MICROBATCHES = 64  # times K: size of the chunks within which windows are sorted by length
_BUDGET_TRIES = 12


@dataclass(frozen=True)
class Windows:
    """Windows of training histories, all `[N]`.

    Inputs are the events `[start, stop - 1)`, targets the events `[first_target, stop)`, each of which is
    predicted at the position of the event before it.
    """

    user: Int64Array
    start: Int64Array
    first_target: Int64Array
    stop: Int64Array

    def __len__(self) -> int:
        return len(self.user)

    @property
    def inputs(self) -> Int64Array:
        """`[N]` input positions of each window."""
        return self.stop - 1 - self.start

    @property
    def targets(self) -> Int64Array:
        """`[N]` targets of each window."""
        return self.stop - self.first_target


@dataclass(frozen=True)
class EpochPlan:
    """One epoch; `steps[s][m]` has the numbers of the examples (windows) of microbatch m of step s."""

    steps: list[list[Int64Array]]
    targets: Int64Array  # [S] targets of each step, by which its loss is divided
    padding: float  # share of padded positions
    digest: str  # sha256 of the examples and their order


def cut_windows(folder: DataFolder, max_length: int, overlap: float) -> Windows:
    """Cut every training history into windows of at most `max_length` inputs.

    Each training event except a user's first is a target in exactly one window. Windows after a user's first
    begin with `floor(max_length * overlap)` events that are only context.
    """
    if max_length < 1 or not 0 <= overlap < 1:
        raise FindRecError(f"need max_length >= 1 and 0 <= overlap < 1, got {max_length} and {overlap}")
    context = int(max_length * overlap)
    fresh = max_length - context  # new targets of every window after the first
    events = folder.valid_start
    more = -(-np.maximum(events - 1 - max_length, 0) // fresh)  # windows after the first
    count = np.where(events >= 2, 1 + more, 0)
    user = np.repeat(np.arange(len(events)), count)
    nth = np.arange(len(user)) - np.repeat(np.cumsum(count) - count, count)
    first_target = np.where(nth == 0, 1, 1 + max_length + (nth - 1) * fresh)
    stop = np.minimum(1 + max_length + nth * fresh, events[user])
    start = np.where(nth == 0, 0, first_target - 1 - context)
    return Windows(user=user, start=start, first_target=first_target, stop=stop)


def cut_prefixes(folder: DataFolder, max_length: int) -> Windows:
    """One window per training event except a user's first, which is its only target.

    The inputs are the up to `max_length` events before it. Many papers train this way; it takes many times
    the computation of `cut_windows` for the same targets.
    """
    if max_length < 1:
        raise FindRecError(f"need max_length >= 1, got {max_length}")
    count = np.maximum(folder.valid_start - 1, 0)
    user = np.repeat(np.arange(len(count)), count)
    target = 1 + np.arange(len(user)) - np.repeat(np.cumsum(count) - count, count)
    start = np.maximum(target - max_length, 0)
    return Windows(user=user, start=start, first_target=target, stop=target + 1)


@dataclass(frozen=True)
class _Sorted:
    """Shuffled windows in chunks, each of which is sorted by length, longest first."""

    order: Int64Array  # [N] window indices
    length: Int64Array  # [N] inputs of each
    edge: list[int]  # ends of the chunks


def _cut_chunks(order: Int64Array, inputs: Int64Array, chunk_tokens: int) -> _Sorted:
    """Split the shuffled windows into chunks of about `chunk_tokens` and sort each, longest first."""
    length = inputs[order]
    ends = np.cumsum(length)
    num_chunks = max(1, int(ends[-1] // chunk_tokens))
    edge = [*np.searchsorted(ends, ends[-1] / num_chunks * np.arange(1, num_chunks)).tolist(), len(order)]
    longest = int(length.max())
    # Keys of a small type are sorted by radix, in a fraction of the time.
    key = (longest - length).astype(np.min_scalar_type(longest))
    for begin, end in itertools.pairwise([0, *edge]):
        inside = begin + np.argsort(key[begin:end], kind="stable")
        order[begin:end], length[begin:end] = order[inside], length[inside]
    return _Sorted(order, length, edge)


def _fill(windows: _Sorted, tokens: int) -> Int64Array:
    """`[M+1]` begin of each microbatch in greedy order (its first window is the longest), and finally N."""
    begins = []
    position = 0
    for end in windows.edge:
        while position < end:
            begins.append(position)
            position += max(1, tokens // int(windows.length[position]))
        position = end
    return np.array([*begins, len(windows.length)], dtype=np.int64)


def _fill_evenly(windows: _Sorted, tokens: int, multiple: int) -> list[slice]:
    """Microbatches of at most `tokens`, their number a multiple of `multiple`, of near-equal size.

    First the token budget is reduced as far as the rounded-up number allows, which spreads the rounding over
    all microbatches; then the largest ones are halved until there are enough.
    """
    cuts = _fill(windows, tokens)
    wanted = -(-(len(cuts) - 1) // multiple) * multiple
    low, high = 1, tokens
    for _ in range(_BUDGET_TRIES):
        if len(cuts) - 1 == wanted or high - low <= 1:
            break
        middle = (low + high) // 2
        tried = _fill(windows, middle)
        if len(tried) - 1 <= wanted:
            cuts, high = tried, middle
        else:
            low = middle
    begin, end = cuts[:-1], cuts[1:].copy()
    while len(begin) < wanted:
        size = end - begin
        cost = np.where(size > 1, size * windows.length[begin], 0)
        largest = np.argsort(-cost, kind="stable")[: wanted - len(begin)]
        largest = largest[cost[largest] > 0]
        if not len(largest):
            raise FindRecError(
                f"{len(begin)} windows that fill a microbatch each cannot be divided into steps of "
                f"{multiple} microbatches: lower training.microbatches or raise training.tokens"
            )
        half = begin[largest] + -(-size[largest] // 2)
        begin, ends = np.concatenate([begin, half]), end[largest]
        end[largest] = half
        end = np.concatenate([end, ends])
    return [slice(*cut) for cut in zip(begin.tolist(), end.tolist(), strict=True)]


def _digest(windows: Windows, steps: list[list[Int64Array]]) -> str:
    flat = [part for step in steps for part in step]
    sizes = np.array([len(part) for part in flat], dtype=np.int64)
    digest = hashlib.sha256()
    for values in (windows.user, windows.start, windows.first_target, windows.stop, sizes, *flat):
        digest.update(np.ascontiguousarray(values, dtype="<i8").data)
    return digest.hexdigest()


def plan_epoch(windows: Windows, *, seed: int, epoch: int, microbatches: int, tokens: int) -> EpochPlan:
    """Plan one epoch of steps with exactly `microbatches` microbatches each.

    Windows are shuffled by a generator keyed by (seed, epoch), grouped by similar length to reduce padding,
    and the groups are shuffled. A microbatch of more than one window has at most `tokens` padded positions.
    Raises `FindRecError` if there are too few windows.
    """
    if len(windows) < microbatches:
        raise FindRecError(
            f"only {len(windows)} training windows for training.microbatches={microbatches}: lower "
            f"training.microbatches to {max(len(windows), 1)} or less"
        )
    rng = np.random.default_rng([seed, epoch])
    inputs = windows.inputs
    chunks = _cut_chunks(rng.permutation(len(windows)), inputs, CHUNK_MICROBATCHES * microbatches * tokens)
    filled = _fill_evenly(chunks, tokens, microbatches)
    order = rng.permutation(len(filled)).tolist()
    steps = [
        [chunks.order[filled[index]] for index in order[begin : begin + microbatches]]
        for begin in range(0, len(order), microbatches)
    ]
    before = np.concatenate([[0], np.cumsum(windows.targets[chunks.order])])
    targets = np.array([before[filled[index].stop] - before[filled[index].start] for index in order])
    padded = sum((part.stop - part.start) * int(chunks.length[part.start]) for part in filled)
    return EpochPlan(
        steps=steps,
        targets=targets.reshape(-1, microbatches).sum(axis=1),
        padding=1.0 - float(inputs.sum()) / padded,
        digest=_digest(windows, steps),
    )


def plan_examples(count: int, *, seed: int, epoch: int, microbatches: int, size: int) -> EpochPlan:
    """Plan one epoch of `count` examples of equal size with one target each.

    They are shuffled by a generator keyed by (seed, epoch) and divided into steps of exactly `microbatches`
    microbatches of at most `size` examples, whose sizes differ by at most one. Raises `FindRecError` if there
    are too few examples.
    """
    num_steps = -(-count // (microbatches * size))
    if count < max(1, num_steps) * microbatches:
        raise FindRecError(
            f"{count} training examples cannot fill {max(1, num_steps)} steps of "
            f"training.microbatches={microbatches}: lower training.microbatches or raise training.tokens"
        )
    order = np.random.default_rng([seed, epoch]).permutation(count)
    parts = np.array_split(order, num_steps * microbatches)
    steps = [parts[begin : begin + microbatches] for begin in range(0, len(parts), microbatches)]
    digest = hashlib.sha256()
    for values in (np.array([len(part) for part in parts], dtype=np.int64), order):
        digest.update(np.ascontiguousarray(values, dtype="<i8").data)
    targets = np.array([sum(len(part) for part in step) for step in steps], dtype=np.int64)
    return EpochPlan(steps=steps, targets=targets, padding=0.0, digest=digest.hexdigest())


def microbatch_seed(seed: int, step: int, microbatch: int) -> int:
    """Random seed of a microbatch, independent of the worker that runs it."""
    digest = hashlib.blake2b(f"{seed}/{step}/{microbatch}".encode(), digest_size=8).digest()
    return int.from_bytes(digest, "big") >> 1


def share(step: list[NDArray[np.int64]], rank: int, world: int) -> list[tuple[int, Int64Array]]:
    """`(microbatch index, example numbers)` of the microbatches that `rank` of `world` runs."""
    if len(step) % world:
        raise FindRecError(
            f"{world} workers cannot share {len(step)} microbatches: cluster.workers must divide "
            "training.microbatches"
        )
    return [(m, step[m]) for m in range(rank, len(step), world)]
