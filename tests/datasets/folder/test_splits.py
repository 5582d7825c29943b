"""Each kind of split, by event and by timestamp."""

from typing import Any

import numpy as np
import pytest
from pydantic import ValidationError

from findrec.datasets.folder.splits import Split, cut


def offsets(*lengths: int) -> np.ndarray:
    return np.concatenate([[0], np.cumsum(lengths)]).astype(np.int64)


def test_by_event() -> None:
    valid, test = cut(Split(unit="event"), np.zeros(10, dtype=np.int64), offsets(4, 1, 2, 3))
    assert valid.tolist() == [2, 1, 1, 1]
    assert test.tolist() == [3, 1, 1, 2]


def test_by_timestamp() -> None:
    time = np.array([1, 1, 2, 2, 2, 3, 3, 5, 5, 5, 6, 7])
    #                [       user 0      ][u1 ][  user 2 ]   user 1 has one basket, user 2 has three
    valid, test = cut(Split(unit="timestamp"), time, offsets(7, 2, 3))
    assert valid.tolist() == [2, 2, 1]
    assert test.tolist() == [5, 2, 2]


def test_equal_times_of_neighbouring_users_are_two_units() -> None:
    valid, test = cut(Split(unit="timestamp"), np.array([1, 2, 2, 3]), offsets(2, 2))
    assert test.tolist() == [1, 1]
    assert valid.tolist() == [1, 1]  # two units: a test, no validation


def test_global_times_are_the_same_for_all_users() -> None:
    split = Split(kind="global_temporal", valid_from=10, test_from=20)
    time = np.array([1, 9, 10, 10, 20, 25, 11, 12, 1, 2, 30])
    valid, test = cut(split, time, offsets(6, 2, 3))
    assert valid.tolist() == [2, 0, 2]  # the second user has no event before the first cut
    assert test.tolist() == [4, 2, 2]


@pytest.mark.parametrize("units", [1, 2, 3, 5, 10, 17, 1000])
@pytest.mark.parametrize("size", [1, 3])
def test_ratio_of_each_users_units(units: int, size: int) -> None:
    time = np.repeat(np.arange(units), size)
    split = Split(kind="per_user_ratio", unit="timestamp")
    valid, test = cut(split, time, np.array([0, len(time)]))
    assert valid[0] % size == test[0] % size == 0
    train, both = valid[0] // size, test[0] // size
    if units == 1:
        assert train == both == 1
    else:
        assert train == max(1, int(units * 7 / 10 + 1e-9))
        assert both == max(train, int(units * 9 / 10 + 1e-9)) < units  # everyone with two units has a test
    alone = cut(Split(kind="per_user_ratio"), time, np.array([0, len(time)]))
    if size == 1:
        assert (alone[0].tolist(), alone[1].tolist()) == (valid.tolist(), test.tolist())


@pytest.mark.parametrize(
    ("units", "train", "valid", "test"),
    [(1, 1, 0, 0), (2, 1, 0, 1), (4, 1, 0, 3), (6, 1, 2, 3), (20, 15, 2, 3)],
)
@pytest.mark.parametrize("size", [1, 3])
def test_tail_of_each_users_units(units: int, train: int, valid: int, test: int, size: int) -> None:
    time = np.repeat(np.arange(units), size)
    starts = cut(Split(kind="tail", last=(2, 3), unit="timestamp"), time, np.array([0, len(time)]))
    assert [int(start[0]) for start in starts] == [train * size, (train + valid) * size]
    assert train + valid + test == units


def test_dates_are_utc_and_defaults_are_filled() -> None:
    split = Split.model_validate(
        {"kind": "global_temporal", "valid_from": "1970-01-02", "test_from": "1970-01-02T01:00:00+01:00"}
    )
    assert (split.valid_from, split.test_from) == (86_400, 86_400)
    assert Split(kind="global_temporal").quantiles == (0.8, 0.9)
    assert Split(kind="per_user_ratio").ratio == (7, 2, 1)
    assert Split(kind="tail").last == (5, 10)


@pytest.mark.parametrize(
    ("tree", "message"),
    [
        ({"kind": "global_temporal", "valid_from": 5}, "both valid_from and test_from"),
        ({"kind": "global_temporal", "valid_from": 5, "test_from": 4}, "not be later"),
        (
            {"kind": "global_temporal", "valid_from": 5, "test_from": 6, "quantiles": [0.1, 0.2]},
            "or quantiles",
        ),
        ({"kind": "global_temporal", "quantiles": [0.9, 0.8]}, "must increase"),
        ({"kind": "leave_one_out", "valid_from": 5, "test_from": 6}, "require kind global_temporal"),
        ({"ratio": [7, 2, 1]}, "requires kind per_user_ratio"),
        ({"kind": "per_user_ratio", "ratio": [7, 2, 0]}, "above 0"),
        ({"kind": "tail", "last": [1, 0]}, "above 0"),
        ({"last": [5, 10]}, "requires kind tail"),
    ],
)
def test_contradictions_are_reported(tree: dict[str, Any], message: str) -> None:
    with pytest.raises(ValidationError, match=message):
        Split.model_validate(tree)
