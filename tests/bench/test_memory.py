"""The peak is the function's own, from a process that never held more."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from findrec.bench.memory import peak_bytes, peak_rss_bytes
from findrec.errors import FindRecError

MIB = 2**20


def test_peak_is_not_hidden_by_what_the_parent_held() -> None:
    held = b"x" * (256 * MIB)
    peak = peak_bytes(_fill, 64 * MIB)
    assert len(held) == 256 * MIB
    assert 60 * MIB < peak < 70 * MIB


def test_failure_is_told() -> None:
    with pytest.raises(FindRecError, match="ZeroDivisionError"):
        peak_bytes(_fail)


def test_own_peak_is_plausible() -> None:
    assert 10 * MIB < peak_rss_bytes() < 1 << 40


def _fill(size: int) -> Callable[[], object]:
    return lambda: b"x" * size


def _fail() -> Callable[[], object]:
    return lambda: 1 // 0
