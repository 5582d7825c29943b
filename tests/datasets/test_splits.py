"""Leave-one-out by event and by timestamp."""

import numpy as np

from findrec.datasets.splits import Split, cut


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
