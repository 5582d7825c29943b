"""Batches have the right events, and the loader yields them in order."""

from __future__ import annotations

import threading
from pathlib import Path

import numpy as np
import pytest
import torch
from window_loader import window_loader

from findrec.datasets.batches.evaluation import evaluation_batch, evaluation_blocks
from findrec.datasets.batches.padding import gap_buckets
from findrec.datasets.batches.plan import EpochPlan, Windows, cut_windows, plan_epoch
from findrec.datasets.batches.windows import train_batch
from findrec.datasets.folder.data_folder import DataFolder
from findrec.datasets.folder.in_memory import write_data_folder


@pytest.fixture
def folder(tmp_path: Path) -> DataFolder:
    rng = np.random.default_rng(0)
    histories = [rng.integers(1, 40, n).tolist() for n in [1, 2, 3, *rng.integers(4, 60, 40)]]
    times = [np.cumsum(rng.integers(0, 3, len(h)) * 86400).tolist() for h in histories]
    return write_data_folder(
        tmp_path / "data", histories, times, num_items=40, unit="timestamp", users_per_member=7
    )


def planned(folder: DataFolder) -> tuple[Windows, EpochPlan]:
    windows = cut_windows(folder, 10, 0.5)
    return windows, plan_epoch(windows, seed=1, epoch=0, microbatches=4, tokens=80)


def test_every_training_event_is_a_target_once(folder: DataFolder) -> None:
    windows, plan = planned(folder)
    targets: list[tuple[int, int]] = []
    for step in plan.steps:
        for chosen in step:
            batch = train_batch(folder, windows, chosen)
            width = batch.item.shape[1]
            assert width == windows.inputs[chosen].max()
            assert batch.length.tolist() == windows.inputs[chosen].tolist()
            assert torch.equal(batch.ids[batch.index], batch.item)
            assert batch.ids[0] == 0
            assert (batch.position.diff() > 0).all()
            for b, w in enumerate(chosen):
                user, start, stop = windows.user[w], windows.start[w], windows.stop[w]
                history = folder.histories([user]).item
                padded = np.zeros(width, dtype=int)
                padded[: stop - 1 - start] = history[start : stop - 1]
                assert batch.item[b].tolist() == padded.tolist()
                assert batch.user[b] == user
                here = (batch.position // width) == b
                places = start + (batch.position[here] % width).numpy()
                assert batch.target[here].tolist() == history[places + 1].tolist()
                targets += [(int(user), int(place) + 1) for place in places]
    expected = [(u, e) for u in range(folder.num_users) for e in range(1, folder.valid_start[u])]
    assert sorted(targets) == expected
    assert sum(plan.targets) == len(expected)


def test_gap_buckets_double() -> None:
    seconds = np.array([5, 5, 6, 8, 8 + 86400, 0, 1 << 40])
    gaps = gap_buckets(seconds, np.array([0, 5, 7]))
    assert gaps.tolist() == [0, 1, 2, 2, 17, 0, 31]


def test_gaps_are_zero_at_the_first_event_and_at_padding(folder: DataFolder) -> None:
    windows, _ = planned(folder)
    batch = train_batch(folder, windows, np.arange(len(windows)))
    assert batch.gap is not None
    assert (batch.gap[:, 0] == 0).all()
    padding = torch.arange(batch.item.shape[1])[None] >= batch.length[:, None]
    assert (batch.gap[padding] == 0).all()
    assert (batch.gap[:, 1:][~padding[:, 1:]] >= 1).all()


@pytest.mark.parametrize("split", ["valid", "test"])
def test_evaluation_batches_have_the_history_without_targets(folder: DataFolder, split: str) -> None:
    first = folder.valid_start if split == "valid" else folder.test_start
    last = folder.test_start if split == "valid" else folder.length
    seen: list[int] = []
    for users in evaluation_blocks(folder, split, 8):  # type: ignore[arg-type]
        assert len(users) <= 8
        batch, cases = evaluation_batch(folder, split, users, 12)  # type: ignore[arg-type]
        seen += users.tolist()
        assert len(batch.target) == 0
        assert (cases.user == torch.from_numpy(users)[cases.row]).all()
        for b, user in enumerate(users):
            history = folder.histories([user]).item
            shown = history[max(0, first[user] - 12) : first[user]]
            assert batch.item[b, : batch.length[b]].tolist() == shown.tolist()
            assert batch.position[b] == b * batch.item.shape[1] + len(shown) - 1
            assert cases.target[cases.row == b].tolist() == history[first[user] : last[user]].tolist()
    assert sorted(seen) == np.flatnonzero((first > 0) & (last > first)).tolist()
    sample = [evaluation_blocks(folder, split, size, sample=5) for size in (2, 100)]  # type: ignore[arg-type]
    drawn = [np.concatenate(blocks).tolist() for blocks in sample]
    assert drawn[0] == drawn[1]
    assert len(set(drawn[0])) == 5 < len(seen)
    assert set(drawn[0]) < set(seen)
    whole = evaluation_blocks(folder, split, 8, sample=len(seen))  # type: ignore[arg-type]
    assert np.concatenate(whole).tolist() == seen
    assert sorted(first[seen]) == first[seen].tolist()


def test_loaders_of_all_ranks_yield_the_whole_plan(folder: DataFolder) -> None:
    windows, plan = planned(folder)
    batches_by_key: dict[tuple[int, int], torch.Tensor] = {}
    for rank in range(2):
        with window_loader(folder, windows, plan, rank=rank, world=2) as loader:
            steps = []
            for step, batches in loader:
                steps.append(step)
                assert [m for m, _ in batches] == [rank, rank + 2]
                batches_by_key |= {(step, m): batch.item for m, batch in batches}
        assert steps == list(range(len(plan.steps)))
    assert len(batches_by_key) == 4 * len(plan.steps)
    for (step, m), item in batches_by_key.items():
        assert torch.equal(item, train_batch(folder, windows, plan.steps[step][m]).item)


def test_loader_resumes_at_a_step(folder: DataFolder) -> None:
    windows, plan = planned(folder)
    whole = list(window_loader(folder, windows, plan, rank=0, world=1))
    rest = list(window_loader(folder, windows, plan, rank=0, world=1, first_step=2))
    assert [step for step, _ in rest] == [step for step, _ in whole[2:]]
    for (_, ours), (_, theirs) in zip(rest, whole[2:], strict=True):
        for (_, one), (_, two) in zip(ours, theirs, strict=True):
            assert torch.equal(one.item, two.item)
            assert torch.equal(one.target, two.target)


def loader_threads() -> list[str]:
    return [t.name for t in threading.enumerate() if t.name == "findrec-loader"]


def test_loader_thread_stops_when_iteration_ends_early(folder: DataFolder) -> None:
    windows, plan = planned(folder)
    with window_loader(folder, windows, plan, rank=0, world=1) as loader:
        for _ in loader:
            break
    assert loader_threads() == []


def test_loader_raises_exceptions_of_its_thread(folder: DataFolder) -> None:
    windows, plan = planned(folder)
    broken = Windows(windows.user, windows.start, windows.first_target, windows.stop + 1000)
    loader = window_loader(folder, broken, plan, rank=0, world=1)
    with pytest.raises(IndexError, match="outside"):
        list(loader)
    assert loader_threads() == []


def test_only_ties_are_shuffled_by_seed(tmp_path):
    items = [np.arange(1, 13), np.arange(13, 25)]
    times = [np.repeat([5, 6, 9], 4), np.arange(12)]
    folder = write_data_folder(tmp_path / "d", items, timestamps=times)
    users = np.array([0, 1])
    first, again, other = (folder.histories(users, tie_seed=seed) for seed in (1, 1, 2))
    assert np.array_equal(first.item, again.item)
    assert not np.array_equal(first.item, other.item)
    assert np.array_equal(first.item[10:], folder.histories(users[1:], np.array([0]), np.array([10])).item)
    for part in (slice(0, 4), slice(4, 8), slice(8, 10)):
        assert sorted(first.item[part]) == sorted(items[0][part])
    alone = folder.histories(users[:1], tie_seed=1)
    assert np.array_equal(alone.item, first.item[:10])


def test_with_shuffled_ties_each_event_is_still_a_target_once(tmp_path):
    rng = np.random.default_rng(0)
    items = [rng.permutation(40)[: int(n)] + 1 for n in rng.integers(5, 40, 12)]
    times = [np.sort(rng.integers(0, 6, len(h))) for h in items]
    folder = write_data_folder(tmp_path / "d", items, timestamps=times, num_items=40)
    windows = cut_windows(folder, 8, 0.5)
    targets = train_batch(folder, windows, np.arange(len(windows)), tie_seed=3).target
    order = folder.histories(np.arange(12), tie_seed=3)
    expected = np.delete(order.item, order.offset[:-1])
    assert sorted(targets.tolist()) == sorted(expected.tolist())


def test_wait_is_the_time_from_each_position_to_its_target(tmp_path):
    times = np.array([0, 0, 1, 100, 100, 5000, 9000])
    folder = write_data_folder(tmp_path / "d", [np.arange(1, 8)], timestamps=[times])
    windows = cut_windows(folder, 10, 0.5)
    batch = train_batch(folder, windows, np.arange(len(windows)))
    targets = times[1:5] - times[:4]  # five training events: four targets
    assert batch.wait.tolist() == [1 + int(np.log2(1 + s)) for s in targets]
    for split, event in (("valid", 5), ("test", 6)):
        shown, _ = evaluation_batch(folder, split, np.array([0]), 10)  # type: ignore[arg-type]
        assert shown.wait.tolist() == [1 + int(np.log2(1 + times[event] - times[event - 1]))]


def test_event_types_stay_with_their_events(tmp_path: Path) -> None:
    """The type is a function of the item, so that a mismatch is detected; ties are shuffled too."""
    rng = np.random.default_rng(1)
    histories = [rng.integers(1, 30, n).tolist() for n in rng.integers(3, 30, 25)]
    times = [np.repeat(np.arange(-(-len(h) // 3)), 3)[: len(h)].tolist() for h in histories]
    names = ["buy", "rate", "view"]
    events = [[names[item % 3] for item in history] for history in histories]
    folder = write_data_folder(tmp_path / "data", histories, times, events=events, num_items=30)
    assert folder.manifest.event_types == names
    windows, plan = planned(folder)
    batches = [
        train_batch(folder, windows, chosen, tie_seed=seed)
        for step in plan.steps
        for chosen in step
        for seed in (None, 5)
    ]
    batches += [
        evaluation_batch(folder, "test", users, 10)[0] for users in evaluation_blocks(folder, "test", 8)
    ]
    for batch in batches:
        assert batch.event is not None
        assert torch.equal(batch.event, torch.where(batch.item > 0, batch.item % 3 + 2, 0))


def test_batches_without_event_types(folder: DataFolder) -> None:
    windows, plan = planned(folder)
    assert train_batch(folder, windows, plan.steps[0][0]).event is None
