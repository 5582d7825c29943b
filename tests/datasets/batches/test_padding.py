"""The compiled and the numpy implementation give the same batches."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from findrec.datasets.batches.batch import Batch
from findrec.datasets.batches.evaluation import history_batch
from findrec.datasets.batches.padding import gap_bucket, gap_buckets, padded_batch
from findrec.datasets.folder import _native
from findrec.datasets.folder._native import Impl, _library, native
from findrec.datasets.folder.data_folder import DataFolder
from findrec.datasets.folder.histories import Histories
from findrec.datasets.folder.in_memory import write_data_folder
from findrec.datasets.folder.packed import tie_keys

needs_compiler = pytest.mark.skipif(isinstance(_library(), str), reason="no C++ compiler here")


def made(lengths: list[int], num_items: int, *, events: bool, seed: int = 0) -> Histories:
    rng = np.random.default_rng(seed)
    offset = np.concatenate([[0], np.cumsum(lengths)])
    steps = rng.choice([0, 1, 2, 3, 1 << 20, (1 << 30) - 2, (1 << 30) - 1, 1 << 40], offset[-1])
    event = rng.integers(-1, 4, offset[-1]) if events else None
    return Histories(rng.integers(1, num_items + 1, offset[-1]), np.cumsum(steps), offset, event)


def same(one: Batch, two: Batch) -> None:
    for name, values in vars(one).items():
        other = getattr(two, name)
        assert (values is None) == (other is None), name
        if values is not None:
            assert values.dtype == other.dtype == torch.int64
            assert torch.equal(values, other), name


@needs_compiler
@settings(max_examples=80, deadline=None)
@given(
    lengths=st.lists(st.integers(2, 40), min_size=1, max_size=30),
    num_items=st.sampled_from([1, 2, 63, 64, 65, 4095, 4096, 4097, 300_000]),
    held=st.booleans(),
    events=st.booleans(),
    seed=st.integers(0, 3),
)
def test_both_implementations_pad_alike(
    lengths: list[int], num_items: int, held: bool, events: bool, seed: int
) -> None:
    rng = np.random.default_rng(seed)
    histories = made(lengths, num_items, events=events, seed=seed)
    skip = rng.integers(0, np.array(lengths)) if held else None
    user = rng.integers(0, 1000, len(lengths))
    given_impl: tuple[Impl, Impl] = ("cpp", "reference")
    one, two = (padded_batch(histories, user, num_items, skip=skip, impl=impl) for impl in given_impl)
    same(one, two)
    assert torch.equal(one.ids[one.index], one.item)


@needs_compiler
@pytest.mark.parametrize("impl", ["cpp", "reference"])
def test_invalid_histories_are_rejected(impl: Impl) -> None:
    good = made([3, 2], 5, events=False)
    user = np.arange(2)
    for item in (0, 6, -1, 1 << 40):
        bad = Histories(np.where(np.arange(5) == 4, item, good.item), good.timestamp, good.offset)
        with pytest.raises(ValueError, match=r"1\.\.5"):
            padded_batch(bad, user, 5, impl=impl)
    empty = Histories(good.item[:3], good.timestamp[:3], np.array([0, 3, 3]))
    with pytest.raises(ValueError, match="needs an input event"):
        padded_batch(empty, user, 5, impl=impl)
    with pytest.raises(ValueError, match="skip must not exceed"):
        padded_batch(good, user, 5, skip=np.array([3, 0]), impl=impl)
    same(padded_batch(good, user, 5, impl=impl), padded_batch(good, user, 5, impl="reference"))


@pytest.mark.parametrize("held", [False, True])
def test_times_are_those_of_the_input_events(held: bool) -> None:
    histories = Histories(np.array([1, 2, 3, 4, 5]), np.array([7, 9, 9, 3, 4]), np.array([0, 3, 5]))
    skip = np.zeros(2, dtype=np.int64) if held else None
    batch = padded_batch(histories, np.arange(2), 5, skip=skip)
    assert batch.time is not None
    assert batch.time.tolist() == ([[7, 9], [3, 0]] if held else [[7, 9, 9], [3, 4, 0]])
    assert batch.query_time is not None
    assert batch.query_time.tolist() == ([9, 9, 4] if held else [])


def test_predictions_have_the_time_they_are_made_at() -> None:
    histories = Histories(np.array([1, 2, 3]), np.array([7, 9, 3]), np.array([0, 2, 3]))
    batch = history_batch(histories, np.arange(2), np.array([12, 3]), 5)
    assert batch.query_time is not None
    assert batch.query_time.tolist() == [12, 3]


def test_targets_can_be_among_the_ids() -> None:
    histories = Histories(np.array([5, 2, 9, 2, 7]), np.arange(5), np.array([0, 3, 5]))
    batch = padded_batch(histories, np.arange(2), 9, skip=np.zeros(2, dtype=np.int64))
    assert batch.ids.tolist() == [0, 2, 5]
    more = batch.with_targets()
    assert more.ids.tolist() == [0, 2, 5, 7, 9]
    assert more.target_index is not None
    assert torch.equal(more.ids[more.index], batch.item)
    assert torch.equal(more.ids[more.target_index], batch.target)
    assert more.with_targets() is more


def test_gap_bucket_agrees_with_gap_buckets() -> None:
    seconds = np.array([0, 1, 2, 3, 7, 8, 1 << 20, (1 << 30) - 2, (1 << 30) - 1, 1 << 45])
    both = np.stack([np.zeros_like(seconds), seconds], axis=1).ravel()
    buckets = gap_buckets(both, np.arange(0, len(both) + 1, 2))[1::2]
    assert buckets.tolist() == [gap_bucket(int(s)) for s in seconds]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> DataFolder:
    """Users of 1 to 200 events in several shards, with many ties and event types."""
    rng = np.random.default_rng(5)
    histories = [rng.integers(1, 90, n).tolist() for n in [1, 2, 3, 200, *rng.integers(1, 60, 60)]]
    times = [np.sort(rng.integers(0, max(2, len(h) // 3), len(h))).tolist() for h in histories]
    events = [[str(item % 3) for item in history] for history in histories]
    path: Path = tmp_path_factory.mktemp("folder") / "data"
    made_folder = write_data_folder(
        path, histories, times, events=events, num_items=90, users_per_member=5, shard_bytes=12_000
    )
    assert len(made_folder.manifest.shards) > 3
    return made_folder


@needs_compiler
@settings(max_examples=60, deadline=None)
@given(seed=st.integers(0, 1000), tie_seed=st.sampled_from([None, 0, 7, 2**63, -1]), rows=st.integers(0, 40))
def test_both_implementations_gather_alike(
    folder: DataFolder, seed: int, tie_seed: int | None, rows: int
) -> None:
    rng = np.random.default_rng(seed)
    users = rng.integers(0, folder.num_users, rows)
    end = folder.length if tie_seed is None else folder.valid_start
    start = rng.integers(0, end[users] + 1)
    stop = rng.integers(start, end[users] + 1)
    one, two = (
        folder.histories(users, start, stop, tie_seed=tie_seed, impl=impl) for impl in ("cpp", "reference")
    )
    for name in ("item", "timestamp", "offset", "event"):
        assert np.array_equal(getattr(one, name), getattr(two, name)), name


@pytest.mark.parametrize("impl", ["cpp", "reference"])
@pytest.mark.parametrize(
    ("user", "start", "stop"), [(3, -1, 2), (3, 2, 1), (3, 0, 201), (-1, 0, 1), (64, 0, 1)]
)
def test_slices_outside_histories_are_rejected(
    folder: DataFolder, impl: Impl, user: int, start: int, stop: int
) -> None:
    if impl == "cpp" and isinstance(_library(), str):
        pytest.skip("no C++ compiler here")
    with pytest.raises(IndexError):
        folder.histories(np.array([0, user]), np.array([0, start]), np.array([1, stop]), impl=impl)


def test_tie_keys_spread() -> None:
    places = np.arange(1000)
    keys = tie_keys(3, np.zeros(1000, dtype=np.int64), places)
    assert len(np.unique(keys)) == 1000
    assert abs(np.corrcoef(np.argsort(keys), places)[0, 1]) < 0.1


def test_without_a_compiler_numpy_is_used(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(_native, "_library", lambda: "no compiler")
    assert native("auto") is None
    assert "no compiler" in capsys.readouterr().out
    with pytest.raises(ValueError, match="cannot be used here"):
        native("cpp")
    histories = made([3, 4], 9, events=False)
    batch = padded_batch(histories, np.arange(2), 9)
    assert batch.length.tolist() == [3, 4]


def test_impl_is_checked() -> None:
    with pytest.raises(ValueError, match="choose one of"):
        native("fast")  # type: ignore[arg-type]
