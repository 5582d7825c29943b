"""Reading resumes exactly, with any number of workers before and after."""

from __future__ import annotations

import hashlib
import itertools
import tempfile
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from window_loader import window_loader

from findrec.datasets.batches.batch import Batch
from findrec.datasets.batches.plan import EpochPlan, Windows, cut_windows, plan_epoch
from findrec.datasets.folder.data_folder import DataFolder
from findrec.datasets.folder.in_memory import write_data_folder
from findrec.datasets.folder.splits import Split
from findrec.datasets.folder.verify import check_folder
from findrec.datasets.folder.writer import Block, FolderInput, write_folder

WORLDS = (1, 2, 3, 4)
Read = dict[tuple[int, int], str]  # (step, microbatch) -> what was in it


def digest(batch: Batch) -> str:
    """A hash of everything in a batch."""
    parts = [f"{k}{v.shape}".encode() + v.numpy().tobytes() for k, v in vars(batch).items() if v is not None]
    return hashlib.sha256(b"".join(parts)).hexdigest()


def read(
    path: Path, windows: Windows, plan: EpochPlan, world: int, *, first: int = 0, steps: int | None = None
) -> Read:
    """What `world` workers, each with its own folder, read of an epoch from step `first` on."""
    found: Read = {}
    for rank in range(world):
        folder = DataFolder.open(path, verify=False)
        with window_loader(
            folder, windows, plan, rank=rank, world=world, first_step=first, shuffle_ties=True
        ) as loader:
            for step, batches in itertools.islice(loader, steps):
                for microbatch, batch in batches:
                    assert (step, microbatch) not in found
                    found[step, microbatch] = digest(batch)
    return found


@pytest.fixture(scope="module")
def path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    rng = np.random.default_rng(2)
    histories = [rng.integers(1, 60, n).tolist() for n in [1, 1, 2, 3, 400, *rng.integers(1, 50, 150)]]
    times = [np.sort(rng.integers(0, 200, len(h))).tolist() for h in histories]
    path = tmp_path_factory.mktemp("resume") / "data"
    write_data_folder(path, histories, times, num_items=60, users_per_member=9, shard_bytes=20_000)
    return path


def planned(path: Path, epoch: int = 0) -> tuple[Windows, EpochPlan]:
    windows = cut_windows(DataFolder.open(path, verify=False), 20, 0.5)
    return windows, plan_epoch(windows, seed=5, epoch=epoch, microbatches=12, tokens=60)


@pytest.fixture(scope="module")
def whole(path: Path) -> Read:
    """An epoch read by one worker without a stop."""
    windows, plan = planned(path)
    found = read(path, windows, plan, 1)
    assert len(found) == 12 * len(plan.steps) >= 12 * 5
    assert len(set(found.values())) == len(found)
    return found


@pytest.mark.parametrize(("before", "after"), list(itertools.product(WORLDS, WORLDS)))
def test_resuming_with_another_number_of_workers(path: Path, whole: Read, before: int, after: int) -> None:
    stop = 2
    seen = read(path, *planned(path), before, steps=stop)
    assert set(seen) == {(s, m) for s in range(stop) for m in range(12)}
    rest = read(path, *planned(path), after, first=stop)  # planned anew, as a restarted run does
    assert not seen.keys() & rest.keys()
    assert seen | rest == whole


def test_resuming_at_every_step(path: Path, whole: Read) -> None:
    windows, plan = planned(path)
    for stop in range(len(plan.steps) + 1):
        rest = read(path, windows, plan, 3, first=stop)
        assert rest == {key: value for key, value in whole.items() if key[0] >= stop}


def test_the_next_epoch_differs(path: Path, whole: Read) -> None:
    assert not set(read(path, *planned(path, epoch=1), 1).values()) & set(whole.values())


@pytest.mark.parametrize(("shards", "world"), [(3, 4), (1, 2), (1, 4), (5, 3)])
def test_shards_and_workers_need_not_match(tmp_path: Path, shards: int, world: int) -> None:
    """Users with nothing to train on and a history longer than the budget are among them."""
    rng = np.random.default_rng(shards)
    lengths = [1, 2, 2, 300, *rng.integers(1, 30, 46)]
    histories = [rng.integers(1, 40, n).tolist() for n in lengths]
    per_member = -(-len(histories) // shards)
    folder = write_data_folder(
        tmp_path / "data", histories, num_items=40, users_per_member=per_member, shard_bytes=1
    )
    assert len(folder.manifest.shards) == shards
    windows = cut_windows(folder, 100, 0.5)
    assert windows.inputs.max() == 100
    plan = plan_epoch(windows, seed=0, epoch=0, microbatches=12, tokens=64)
    found = read(folder.path, windows, plan, world)
    assert set(found) == {(s, m) for s in range(len(plan.steps)) for m in range(12)}
    assert plan.targets.sum() == np.maximum(folder.valid_start - 1, 0).sum()
    assert found == read(folder.path, windows, plan, 1)


@settings(max_examples=40, deadline=None)
@given(
    blocks=st.lists(st.lists(st.integers(0, 6), min_size=1, max_size=6), min_size=1, max_size=6),
    split=st.sampled_from(
        [
            Split(),
            Split(unit="timestamp"),
            Split(kind="per_user_ratio", ratio=(7, 2, 1)),
            Split(kind="global_temporal", valid_from=20, test_from=40),
        ]
    ),
)
def test_users_without_events_are_read_and_skipped(blocks: list[list[int]], split: Split) -> None:
    rng = np.random.default_rng(0)
    length = np.concatenate(blocks)
    if not length.any():
        return
    packed = [
        Block(
            {"item": rng.integers(1, 10, sum(some)), "timestamp": np.arange(sum(some)) * 7 // 2 * 2},
            np.array(some),
        )
        for some in blocks
    ]
    names = pa.array([str(v) for v in range(1, 10)])
    nothing = pa.array([None] * 9, pa.string())
    given_folder = FolderInput(
        recipe="empty",
        recipe_sha256="",
        split=split,
        users=pa.array([str(u) for u in range(len(length))]),
        items=pa.table({"raw": names, "title": names, "text": nothing, "category": nothing}),
        blocks=packed,
    )
    with tempfile.TemporaryDirectory() as scratch:
        write_folder(Path(scratch) / "data", given_folder, shard_bytes=1)
        folder = check_folder(Path(scratch) / "data")
        assert len(folder.manifest.shards) == len(blocks)
        assert folder.length.tolist() == length.tolist()
        assert (folder.valid_start[length > 0] > 0).all() or split.kind == "global_temporal"
        got = folder.histories(np.arange(len(length)))
        assert got.item.tolist() == np.concatenate([block.columns["item"] for block in packed]).tolist()
        windows = cut_windows(folder, 3, 0.5)
        assert windows.targets.sum() == np.maximum(folder.valid_start - 1, 0).sum()
        if len(windows):
            plan = plan_epoch(windows, seed=0, epoch=0, microbatches=1, tokens=6)
            found = read(folder.path, windows, plan, 1)
            assert len(found) == len(plan.steps)


@settings(max_examples=40, deadline=None)
@given(
    lengths=st.one_of(
        st.lists(st.integers(1, 12), min_size=1, max_size=30),
        st.just([1]),
        st.just([5000]),
        st.just([1, 3000, 1]),
    ),
    users_per_member=st.integers(1, 40),
    shard_bytes=st.sampled_from([1, 5000, 1 << 20]),
    typed=st.booleans(),
    seed=st.integers(0, 9),
)
def test_written_events_are_read_back(
    lengths: list[int], users_per_member: int, shard_bytes: int, typed: bool, seed: int
) -> None:
    rng = np.random.default_rng(seed)
    items = [rng.integers(1, 100, n) for n in lengths]
    times = [np.sort(rng.integers(-(1 << 40), 1 << 40, n)) for n in lengths]
    names = np.array(["buy", "rate", "view"])
    events = [names[rng.integers(0, 3, n)] for n in lengths] if typed else None
    with tempfile.TemporaryDirectory() as scratch:
        path = Path(scratch) / "data"
        write_data_folder(
            path,
            items,  # type: ignore[arg-type]
            times,  # type: ignore[arg-type]
            events=events,  # type: ignore[arg-type]
            num_items=100,
            split=Split(unit="timestamp"),
            users_per_member=users_per_member,
            shard_bytes=shard_bytes,
        )
        folder = check_folder(path)
        if shard_bytes == 1:
            assert len(folder.manifest.shards) == -(-len(lengths) // users_per_member)
        order = rng.permutation(len(lengths))
        got = folder.histories(order)
        for r, user in enumerate(order):
            mine = slice(got.offset[r], got.offset[r + 1])
            assert np.array_equal(got.item[mine], items[user])
            assert np.array_equal(got.timestamp[mine], times[user])
            if typed:
                assert got.event is not None
                kinds = np.array(folder.manifest.event_types)[got.event[mine]]
                assert events is not None
                assert np.array_equal(kinds, events[user])
        blocks = list(folder.blocks())
        assert np.array_equal(np.concatenate([b.item for b in blocks]), np.concatenate(items))
        assert sum(len(b.offset) - 1 for b in blocks) == len(lengths)
