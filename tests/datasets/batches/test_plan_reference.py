"""The epoch plan equals that of a simple reference program bit for bit, as resumption depends on it."""

from __future__ import annotations

import hashlib

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from findrec.datasets.batches import plan as planning
from findrec.datasets.batches.plan import Windows, plan_epoch

BUDGET_TRIES = 12
Steps = list[list[list[int]]]


def cut_greedily(chunks: list[list[int]], inputs: list[int], tokens: int) -> list[list[int]]:
    """Each microbatch takes as many windows as fit at the length of its first, the longest."""
    filled = []
    for chunk in chunks:
        rest = chunk
        while rest:
            size = max(1, tokens // inputs[rest[0]])
            filled.append(rest[:size])
            rest = rest[size:]
    return filled


def reference_plan(windows: Windows, seed: int, epoch: int, microbatches: int, tokens: int) -> Steps:
    """Window indices of each microbatch of each step."""
    rng = np.random.default_rng([seed, epoch])
    inputs = windows.inputs.tolist()
    order = rng.permutation(len(inputs)).tolist()
    total, ends = 0, []
    for window in order:
        total += inputs[window]
        ends.append(total)
    num_chunks = max(1, total // (planning.CHUNK_MICROBATCHES * microbatches * tokens))
    chunks: list[list[int]] = [[] for _ in range(num_chunks)]
    for window, end in zip(order, ends, strict=True):
        chunks[sum(end >= total / num_chunks * k for k in range(1, num_chunks))].append(window)
    chunks = [sorted(chunk, key=lambda window: -inputs[window]) for chunk in chunks]
    filled = cut_greedily(chunks, inputs, tokens)
    wanted = -(-len(filled) // microbatches) * microbatches
    low, high = 1, tokens
    for _ in range(BUDGET_TRIES):
        if len(filled) == wanted or high - low <= 1:
            break
        middle = (low + high) // 2
        tried = cut_greedily(chunks, inputs, middle)
        if len(tried) <= wanted:
            filled, high = tried, middle
        else:
            low = middle
    while len(filled) < wanted:
        cost = [len(part) * inputs[part[0]] if len(part) > 1 else 0 for part in filled]
        largest = sorted(range(len(filled)), key=lambda place: -cost[place])[: wanted - len(filled)]
        for place in (place for place in largest if cost[place]):
            part = filled[place]
            filled[place] = part[: -(-len(part) // 2)]
            filled.append(part[-(-len(part) // 2) :])
    shuffled = [filled[place] for place in rng.permutation(len(filled))]
    return [shuffled[begin : begin + microbatches] for begin in range(0, len(shuffled), microbatches)]


def digest(windows: Windows, steps: Steps) -> str:
    """sha256 of the windows, the sizes of the microbatches, and what is in them, all as int64."""
    flat = [part for step in steps for part in step]
    columns = [windows.user, windows.start, windows.first_target, windows.stop, [len(p) for p in flat], *flat]
    return hashlib.sha256(b"".join(np.array(c, dtype="<i8").tobytes() for c in columns)).hexdigest()


def of_lengths(inputs: list[int]) -> Windows:
    zeros = np.zeros(len(inputs), dtype=np.int64)
    return Windows(
        user=np.arange(len(inputs)), start=zeros, first_target=zeros + 1, stop=np.array(inputs) + 1
    )


@settings(max_examples=80, deadline=None)
@given(
    lengths=st.lists(st.one_of(st.integers(1, 9), st.integers(1, 300)), min_size=40, max_size=300),
    microbatches=st.integers(1, 12),
    tokens=st.integers(1, 700),
    chunk=st.sampled_from([1, 3, 64]),
    seed=st.integers(0, 3),
)
def test_equals_the_reference(
    lengths: list[int], microbatches: int, tokens: int, chunk: int, seed: int
) -> None:
    windows = of_lengths(lengths)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(planning, "CHUNK_MICROBATCHES", chunk)  # small ones, so that there are many
        if tokens < max(lengths) and len(lengths) % microbatches:
            tokens = max(lengths) + tokens  # else there may be too few windows to share out
        found = plan_epoch(windows, seed=seed, epoch=2, microbatches=microbatches, tokens=tokens)
        expected = reference_plan(windows, seed, 2, microbatches, tokens)
    assert [[part.tolist() for part in step] for step in found.steps] == expected
    assert found.digest == digest(windows, expected)
    targets = windows.targets
    assert found.targets.tolist() == [
        sum(int(targets[w]) for part in step for w in part) for step in expected
    ]
    padded = sum(len(part) * lengths[part[0]] for step in expected for part in step)
    assert found.padding == 1.0 - float(sum(lengths)) / padded
