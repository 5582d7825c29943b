"""Windows and the epoch plan: every target once, the same for any number of workers, little padding."""

from __future__ import annotations

import time
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from findrec.datasets.batches.plan import EpochPlan, Windows, cut_prefixes, cut_windows, plan_epoch, share
from findrec.datasets.folder.data_folder import DataFolder
from findrec.datasets.folder.in_memory import write_data_folder
from findrec.errors import FindRecError


class Lengths:
    """The part of a data folder that `cut_windows` needs."""

    def __init__(self, training_events: list[int]) -> None:
        self.valid_start = np.array(training_events, dtype=np.int64)


def windows_of(training_events: list[int], max_length: int, overlap: float) -> Windows:
    return cut_windows(Lengths(training_events), max_length, overlap)  # type: ignore[arg-type]


def of_lengths(inputs: np.ndarray) -> Windows:
    zeros = np.zeros(len(inputs), dtype=np.int64)
    return Windows(user=np.arange(len(inputs)), start=zeros, first_target=zeros + 1, stop=inputs + 1)


@settings(max_examples=60, deadline=None)
@given(
    events=st.lists(st.integers(1, 400), min_size=1, max_size=12),
    max_length=st.integers(2, 60),
    overlap=st.floats(0, 0.99),
)
def test_each_training_event_but_the_first_is_a_target_once(
    events: list[int], max_length: int, overlap: float
) -> None:
    windows = windows_of(events, max_length, overlap)
    context = int(max_length * overlap)
    for user, length in enumerate(events):
        mine = np.flatnonzero(windows.user == user)
        targets = [np.arange(windows.first_target[w], windows.stop[w]) for w in mine]
        assert np.concatenate([*targets, []]).tolist() == list(range(1, length))
        for w in mine:
            assert 1 <= windows.inputs[w] <= max_length
            assert windows.targets[w] >= 1
            before = windows.first_target[w] - 1 - windows.start[w]
            assert before == (0 if w == mine[0] else context)


@settings(max_examples=60, deadline=None)
@given(events=st.lists(st.integers(1, 60), min_size=1, max_size=12), max_length=st.integers(1, 30))
def test_prefixes_have_the_same_targets_in_separate_windows(events: list[int], max_length: int) -> None:
    prefixes = cut_prefixes(Lengths(events), max_length)  # type: ignore[arg-type]
    whole = windows_of(events, 30, 0.5)
    everything = [
        (user, event)
        for user, first, stop in zip(whole.user, whole.first_target, whole.stop, strict=True)
        for event in range(first, stop)
    ]
    assert sorted(zip(prefixes.user, prefixes.first_target, strict=True)) == sorted(everything)
    assert (prefixes.targets == 1).all()
    assert (prefixes.inputs == np.minimum(prefixes.first_target, max_length)).all()


@settings(max_examples=60, deadline=None)
@given(
    lengths=st.lists(st.integers(1, 50), min_size=40, max_size=200),
    microbatches=st.integers(1, 8),
    tokens=st.integers(100, 400),
    seed=st.integers(0, 5),
)
def test_plan_is_a_partition_within_the_budget(
    lengths: list[int], microbatches: int, tokens: int, seed: int
) -> None:
    windows = of_lengths(np.array(lengths))
    plan = plan_epoch(windows, seed=seed, epoch=3, microbatches=microbatches, tokens=tokens)
    flat = [part for step in plan.steps for part in step]
    assert np.sort(np.concatenate(flat)).tolist() == list(range(len(lengths)))
    assert all(len(step) == microbatches for step in plan.steps)
    assert all(len(part) for part in flat)
    for part in flat:
        assert len(part) == 1 or len(part) * windows.inputs[part].max() <= tokens
    for step, targets in zip(plan.steps, plan.targets, strict=True):
        assert targets == sum(windows.targets[part].sum() for part in step)


def skewed(count: int = 5000) -> Windows:
    rng = np.random.default_rng(0)
    return of_lengths(np.minimum(1 + rng.geometric(1 / 60, count), 200))


def plan_of(windows: Windows, seed: int = 0, epoch: int = 0) -> EpochPlan:
    return plan_epoch(windows, seed=seed, epoch=epoch, microbatches=12, tokens=3200)


def test_padding_and_step_sizes() -> None:
    plan = plan_of(skewed())
    assert plan.padding < 0.05
    assert plan.targets.max() / plan.targets.min() < 1.25


def test_plan_depends_only_on_seed_and_epoch() -> None:
    windows = skewed()
    assert plan_of(windows).digest == plan_of(windows).digest
    digests = {plan_of(windows, seed, epoch).digest for seed in range(3) for epoch in range(3)}
    assert len(digests) == 9
    assert plan_of(skewed(4999)).digest not in digests


def test_windows_are_grouped_differently_in_each_epoch() -> None:
    windows = of_lengths(np.full(1000, 20))
    groups = [
        {frozenset(part.tolist()) for step in plan_of(windows, epoch=e).steps for part in step}
        for e in (0, 1)
    ]
    assert not groups[0] & groups[1]


def test_long_and_short_microbatches_are_mixed_over_the_epoch() -> None:
    windows = skewed()
    plan = plan_of(windows)
    means = [np.mean([windows.inputs[part].mean() for part in step]) for step in plan.steps]
    order = np.arange(len(means))
    assert abs(np.corrcoef(order, means)[0, 1]) < 0.6
    first, last = plan.steps[0], plan.steps[-1]
    for step in (first, last):
        lengths = [windows.inputs[part].max() for part in step]
        assert max(lengths) > 2 * min(lengths)


@pytest.mark.parametrize("world", [1, 2, 3, 4, 6, 12])
def test_workers_share_each_step_without_overlap(world: int) -> None:
    for step in plan_of(skewed(500)).steps:
        shares = [share(step, rank, world) for rank in range(world)]
        assert {len(mine) for mine in shares} == {12 // world}
        assert sorted(m for mine in shares for m, _ in mine) == list(range(12))
        assert all(chosen is step[m] for mine in shares for m, chosen in mine)
    with pytest.raises(FindRecError, match="must divide"):
        share(step, 0, 5)


@settings(max_examples=60, deadline=None)
@given(
    events=st.lists(st.integers(1, 150), min_size=60, max_size=120),
    max_length=st.integers(2, 60),
    overlap=st.floats(0, 0.9),
    world=st.sampled_from([1, 2, 3, 4, 6]),
    seed=st.integers(0, 3),
)
def test_every_event_is_a_target_once_whatever_the_workers(
    events: list[int], max_length: int, overlap: float, world: int, seed: int
) -> None:
    windows = windows_of([*events, 1, 2, 400], max_length, overlap)
    plan = plan_epoch(windows, seed=seed, epoch=1, microbatches=12, tokens=400)
    targets = [
        (int(windows.user[w]), event)
        for step in plan.steps
        for rank in range(world)
        for _, chosen in share(step, rank, world)
        for w in chosen
        for event in range(windows.first_target[w], windows.stop[w])
    ]
    users = enumerate([*events, 1, 2, 400])
    assert sorted(targets) == [(user, event) for user, length in users for event in range(1, length)]
    assert plan.targets.sum() == len(targets)


def shaped(kind: str) -> tuple[Windows, int]:
    """Windows of a kind of data set, and the tokens of a microbatch."""
    rng = np.random.default_rng(1)
    if kind == "short":
        return of_lengths(np.minimum(rng.geometric(1 / 10, 40_000), 200)), 2048
    if kind == "long":
        return of_lengths(np.clip(np.exp(rng.normal(5.8, 1.3, 4000)).astype(int), 1, 500)), 4096
    return of_lengths(np.full(9000, 37)), 1024


@pytest.mark.parametrize("kind", ["short", "long", "equal"])
@pytest.mark.parametrize("world", [2, 3, 4, 6, 12])
def test_ranks_have_equal_work(kind: str, world: int) -> None:
    windows, tokens = shaped(kind)
    plan = plan_epoch(windows, seed=0, epoch=0, microbatches=12, tokens=tokens)
    assert len(plan.steps) >= 12
    work = np.zeros(world)
    for step in plan.steps:
        for rank in range(world):
            for _, chosen in share(step, rank, world):
                work[rank] += len(chosen) * windows.inputs[chosen].max()
    bound = max(0.02, windows.inputs.max() / (tokens * 12 / world))
    assert work.max() / work.mean() - 1 <= bound


@pytest.mark.parametrize("kind", ["short", "long", "equal"])
def test_windows_are_spread_uniformly_over_steps(kind: str) -> None:
    windows, tokens = shaped(kind)
    bins, epochs = 10, 4
    table = np.zeros((bins, bins))
    for epoch in range(epochs):
        plan = plan_epoch(windows, seed=5, epoch=epoch, microbatches=12, tokens=tokens)
        for index, step in enumerate(plan.steps):
            place = np.concatenate(step) * bins // len(windows)
            table[index * bins // len(plan.steps)] += np.bincount(place, minlength=bins)
    expected = table.sum(1, keepdims=True) * table.sum(0, keepdims=True) / table.sum()
    chi2 = ((table - expected) ** 2 / expected).sum()
    freedom = (bins - 1) ** 2
    assert abs(chi2 - freedom) < 5 * np.sqrt(2 * freedom)  # neither lumped nor suspiciously even


def test_neighbouring_windows_are_separated() -> None:
    windows, tokens = shaped("equal")
    plan = plan_epoch(windows, seed=0, epoch=0, microbatches=12, tokens=tokens)
    part = np.zeros(len(windows), dtype=np.int64)
    for number, chosen in enumerate(chosen for step in plan.steps for chosen in step):
        part[chosen] = number
    together = (np.diff(part) == 0).sum()  # expected: 8,999 pairs over 336 microbatches
    expected = (len(windows) - 1) / (part.max() + 1)
    assert abs(together - expected) < 5 * np.sqrt(expected)


def test_too_few_windows_are_reported() -> None:
    with pytest.raises(FindRecError, match=r"lower training\.microbatches to 7"):
        plan_epoch(of_lengths(np.full(7, 5)), seed=0, epoch=0, microbatches=8, tokens=100)
    with pytest.raises(FindRecError, match=r"raise training\.tokens"):
        plan_epoch(of_lengths(np.full(9, 100)), seed=0, epoch=0, microbatches=8, tokens=100)


def test_no_validation_or_test_event_is_in_a_window(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    histories = [rng.integers(1, 20, rng.integers(1, 50)).tolist() for _ in range(30)]
    times = [np.sort(rng.integers(0, 12, len(h))).tolist() for h in histories]
    folder = write_data_folder(tmp_path / "data", histories, times, unit="timestamp")
    windows = cut_windows(folder, 8, 0.5)
    assert (windows.stop <= folder.valid_start[windows.user]).all()
    assert windows.targets.sum() == np.maximum(folder.valid_start - 1, 0).sum()
    assert isinstance(folder, DataFolder)


def test_a_million_windows_are_planned_in_seconds() -> None:
    windows = skewed(1_000_000)
    begin = time.perf_counter()
    plan = plan_of(windows)
    assert time.perf_counter() - begin < 15  # 0.7 s on an idle core
    assert plan.padding < 0.02
